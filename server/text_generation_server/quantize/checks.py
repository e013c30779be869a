"""The command up to what needs weights: what a user can get wrong is refused here, at once.

Importing this does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..planning import ModelPlan, plan_model
from ..quantization.format import WeightFormat
from .documents import open_documents
from .formats import check_shapes
from .settings import Options
from .staging import COMPLETE, FOLDER, check_output, finished_run
from .upload import check_name
from .windows import Windows, make_windows

if TYPE_CHECKING:
    from .run import Outcome


@dataclass(frozen=True)
class Checked:
    """A command that can be carried out. done: what the report of a finished result says, if there is one already."""

    plan: ModelPlan
    formats: Mapping[str, WeightFormat]  # of every linear that is quantized
    windows: Windows
    done: Mapping[str, Any] | None


def quantize(options: Options, begins: Callable[[], None] = lambda: None) -> Outcome:
    """The whole command. `begins` is called when everything is checked and all modules are there.

    Raises:
        ShardError: in one line, what is wrong and what to do.
    """
    checked = check(options)
    from .run import carry_out

    return carry_out(options, checked, begins)


def check(options: Options) -> Checked:
    """Model, scheme, output folder, text; in this order, so that nothing is made where there is nothing to do."""
    if options.upload_to is not None:
        check_name(options.upload_to)
    plan = plan_model(options.model_dir, world_size=1)
    if plan.quantization.method is not None:
        raise ConfigError(
            f"{options.model_dir}: is quantized already ({plan.quantization.describe()}); expected plain weights, in "
            "float32, float16 or bfloat16"
        )
    plan.check_tokenizer()
    formats = check_shapes(options.scheme, {name: linear.shape for name, linear in plan.linears.items()})
    # A run that ended while its files moved into place is not finished.
    moving = (options.output_dir / FOLDER / COMPLETE).exists()
    done = None if options.overwrite or moving else finished_run(options.output_dir)
    if done is None:
        check_output(options.model_dir, options.output_dir, options.overwrite)
    windows = make_windows(
        open_documents(options.sampling.dataset, options.model_dir), options.model_dir, options.sampling,
        plan.settings.max_positions, plan.settings.vocab_size,
    )  # fmt: skip
    return Checked(plan, formats, windows, done)
