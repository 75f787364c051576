"""The only Ray code of the library: one room per job, adapters from Ray to the rooms of `fruitray`."""
