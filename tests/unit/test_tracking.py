"""Whether W&B knows the user: `wandb login` leaves the key in netrc, under the server's name."""

import pytest

from trainer.monitor.tracking import logged_in


@pytest.mark.parametrize(
    "url, host, known",
    [
        ("", "api.wandb.ai", True),
        ("", "api.forge.coreweave.com", True),
        ("", "example.org", False),
        ("https://wandb.example.org/x", "wandb.example.org", True),
        ("https://wandb.example.org/x", "api.wandb.ai", False),
    ],
)
def test_hosts(tmp_path, monkeypatch, url, host, known):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", url)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "netrc").write_text(f"machine {host}\n  login user\n  password {'0' * 40}\n")
    assert logged_in() == known
