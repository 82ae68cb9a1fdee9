"""How the page looks: the theme's fonts and colours, and the style sheet beside this file."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

CSS = Path(__file__).with_name("page.css")

TOGGLE_DARK_JS = "() => { document.body.classList.toggle('dark') }"


def theme() -> gr.themes.Base:
    """Gradio's Soft theme with the system's own fonts: a named web font would be asked of another host."""
    return gr.themes.Soft(
        primary_hue="indigo",
        secondary_hue="indigo",
        neutral_hue="slate",
        radius_size="md",
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
        font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"],
    ).set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        block_shadow="none",
        block_border_width="1px",
        block_title_background_fill="transparent",
        block_title_background_fill_dark="transparent",
        block_title_padding="0",
        block_title_text_color="*body_text_color_subdued",
        block_title_text_color_dark="*body_text_color_subdued",
        block_title_text_weight="500",
        # Subdued by default is too pale to read in small type.
        body_text_color_subdued="*neutral_500",
    )
