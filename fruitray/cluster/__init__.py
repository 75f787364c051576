"""The only Ray code of the library: one room per job, adapters from Ray to the rooms of `fruitray`.

Here stands what Ray reads of the environment when it is imported.
"""

import os
import sys

ATTEMPTS = 10
"""How many workers may die over one task, or one table of a stream, before the job does."""

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Tune's own screen; ours is `console.py`
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1")  # else a search forgets trials that ended in its last seconds
os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")  # every second is meant
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # else Ctrl-C would end a search as if it were complete
os.environ.setdefault("RAY_task_oom_retries", str(ATTEMPTS))  # else what never has memory enough is tried for ever


def token_path() -> str:
    """The file that Ray keeps its token in, or would."""
    return os.environ.get("RAY_AUTH_TOKEN_PATH") or os.path.expanduser("~/.ray/auth_token")


# Where there is a token, `ray start` asks for it; to join, say so. Unless Ray is imported, and has read this: what it
# starts would ask for a token that it does not show.
if "ray" not in sys.modules and (os.environ.get("RAY_AUTH_TOKEN") or os.path.exists(token_path())):
    os.environ.setdefault("RAY_AUTH_MODE", "token")
