"""One page of HTML per run: what its jobs found, as tables, charts and photos, in a file that needs nothing else.

outputs (what lies where) -> photos | trials | model | scoring (what each says) -> page (HTML)
"""
