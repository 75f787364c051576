"""What jobs ask of a cluster before they give it work."""

import pytest

from fruitray.cluster.runtime import OPEN, require_token
from fruitray.errors import UsageError


def test_several_nodes_without_a_token_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.delenv(OPEN, raising=False)
    require_token(1)
    with pytest.raises(UsageError, match=f"RAY_AUTH_MODE=token.*{OPEN}=1"):
        require_token(2)


@pytest.mark.parametrize(("name", "value"), [("RAY_AUTH_MODE", "token"), (OPEN, "1")])
def test_a_token_or_a_word_opens_the_way(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setenv(name, value)
    require_token(2)
