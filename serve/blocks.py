"""Gradio's Blocks, but what an event leaves as it is costs nothing.

For each `gr.skip()` Gradio makes the component anew and describes it twice, which takes it 0.5 to 1 ms. An event that
redraws a reply twenty times a second, and leaves twenty other components alone, would spend most of its time on these.
"""

from __future__ import annotations

import copy
from typing import Any

import gradio as gr
from gradio.blocks import BlockFunction, convert_component_dict_to_list
from gradio.state_holder import SessionState

SKIP = gr.skip()


class Blocks(gr.Blocks):
    """To be used as `gr.Blocks`."""

    async def postprocess_data(
        self, block_fn: BlockFunction, predictions: list[Any] | dict[Any, Any], state: SessionState | None
    ) -> list[Any]:
        """As in Gradio, with the same results; it is not asked about outputs that are skipped."""
        outputs = list(block_fn.outputs)
        values: Any = predictions
        if isinstance(values, dict) and values and "__type__" not in values:
            values = convert_component_dict_to_list(outputs, values)
        if block_fn.batch or len(outputs) < 2 or not isinstance(values, list | tuple) or len(values) != len(outputs):
            return await super().postprocess_data(block_fn, predictions, state)
        # A component's value may be an array, which has no single answer to `==`.
        told = [i for i, value in enumerate(values) if not (isinstance(value, dict) and value == SKIP)]
        results: list[Any] = [None if output.stateful else dict(SKIP) for output in outputs]
        if told:
            rest = copy.copy(block_fn)
            rest.outputs = [outputs[i] for i in told]
            # Gradio wants the value of a single output as it is.
            given = values[told[0]] if len(told) == 1 else [values[i] for i in told]
            for i, result in zip(told, await super().postprocess_data(rest, given, state), strict=True):
                results[i] = result
        return results
