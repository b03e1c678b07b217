"""The page's frame: language, navigation, and what stands on every page."""

from __future__ import annotations

import sys
from pathlib import Path

# Streamlit puts this folder on the path, not the one above, which the packages lie in.
if (_root := str(Path(__file__).resolve().parent.parent)) not in sys.path:
    sys.path.insert(0, _root)

import streamlit as st

from ui import parts
from ui.words import LANGUAGES, words

# Of an icon by name the browser would ask a font server of Google for its picture.
_ICON = str(Path(__file__).with_name("icon.svg"))
_STYLE = Path(__file__).with_name("style.css")
_PAGES = {
    "encounter": ":material/person:",
    "batch": ":material/table_rows:",
    "model": ":material/monitoring:",
}


def _choose_language() -> str:
    """The language of the address at first, then what the user picks."""
    asked = st.query_params.get("lang", "")
    if "language" not in st.session_state:
        st.session_state["language"] = asked if asked in LANGUAGES else LANGUAGES[0]
    language = str(st.session_state["language"])
    if asked != language and (asked or language != LANGUAGES[0]):
        st.query_params["lang"] = language
    return language


def _main() -> None:
    text = words(_choose_language())
    st.set_page_config(page_title=text("title"), page_icon=_ICON, layout="wide")
    st.html(f"<style>{_STYLE.read_text(encoding='utf-8')}</style>")
    # A screen reader picks its voice by this; nothing that a user typed gets in here.
    st.html(
        f"<script>document.documentElement.lang = '{text.language}'</script>",
        unsafe_allow_javascript=True,
    )
    here = Path(__file__).parent
    page = st.navigation(
        [
            st.Page(
                here / f"{name}.py",
                title=text(f"nav.{name}"),
                icon=icon,
                url_path=name,
                default=name == "encounter",
            )
            for name, icon in _PAGES.items()
        ]
    )
    with st.sidebar:
        st.radio(
            text("language"),
            LANGUAGES,
            key="language",
            format_func=lambda language: words(language).all["language"],
            on_change=parts.keep_values,
            horizontal=True,
        )
    with st.container(border=True, key="notice"):
        st.markdown(f":material/info: {text('notice')}")
    page.run()


_main()
