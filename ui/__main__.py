"""`python -m ui`: start the page with the options and the theme that belong to it.

Streamlit reads its config file from the working directory only, so everything is passed as flags.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from streamlit.web.cli import main as streamlit

from settings import Settings, settings

_OPTIONS = {
    "server.headless": "true",
    "server.fileWatcherType": "none",
    "server.maxUploadSize": "512",
    "browser.gatherUsageStats": "false",
    "client.toolbarMode": "minimal",
    # A traceback could show what was typed; the log has it without values.
    "client.showErrorDetails": "none",
    "client.showErrorLinks": "false",
    "theme.base": "light",
    "theme.primaryColor": "#0b5cad",
    "theme.linkColor": "#0b5cad",
    "theme.backgroundColor": "#ffffff",
    "theme.secondaryBackgroundColor": "#f2f5f9",
    "theme.textColor": "#1b1f24",
    "theme.borderColor": "#767f8c",
    "theme.showWidgetBorder": "true",
    "theme.baseRadius": "0.4rem",
}


def arguments(chosen: Settings) -> list[str]:
    """Command line of Streamlit for these settings."""
    options = _OPTIONS | {
        "server.address": chosen.ui_host,
        "server.port": str(chosen.ui_port),
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    return ["run", str(Path(__file__).with_name("app.py")), *flags]


if __name__ == "__main__":
    # On first use Streamlit asks for an e-mail address, even where nobody can answer.
    os.environ.setdefault("STREAMLIT_SERVER_SHOW_EMAIL_PROMPT", "false")
    sys.exit(streamlit(args=arguments(settings()), prog_name="streamlit"))
