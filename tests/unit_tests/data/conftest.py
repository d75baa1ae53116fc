import pytest


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Unpacked copies and indices go to ~/.cache: keep them out of the real one."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
