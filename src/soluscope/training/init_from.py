"""A run that starts with the weights of a finished run (train.init_from) instead of random ones."""

from __future__ import annotations

from soluscope.config import Config
from soluscope.data.cache import TokenCache
from soluscope.errors import UserError
from soluscope.model import LanguageModel
from soluscope.runs.folder import Run
from soluscope.runs.weights import Origin


def origin_of(config: Config) -> Origin | None:
    """Return the origin of the initial weights, or None for random weights.

    Raises:
        UserError: if train.init_from is not the folder of a finished run.
    """
    if config.init_dir is None:
        return None
    try:
        facts = Run(config.init_dir).facts
    except UserError as error:
        raise UserError(f"train.init_from: {error}") from error
    earlier = facts.init_from or Origin("", "", 0, 0)
    return Origin(
        f"{facts.study}/{facts.run}",
        facts.config,
        facts.steps + earlier.steps,
        facts.tokens + earlier.tokens,
    )


def rows_before(config: Config) -> int:
    """Return the number of rows that were drawn before this run's first batch.

    The batches continue there, so that the rows of the origin's last epoch are not repeated at once.
    """
    origin = origin_of(config)
    return 0 if origin is None else origin.tokens // config.model.ctx


def load_origin(model: LanguageModel, config: Config, cache: TokenCache) -> None:
    """Load the weights of train.init_from into `model`, and the gain if both models have a constant one.

    Raises:
        UserError: if it is not a finished run, or differs in its tokenizer or in the shape of a parameter.
    """
    if config.init_dir is None:
        return
    origin_of(config)  # its error names the setting
    run = Run(config.init_dir)
    if run.facts.tokenizer_hash != cache.meta["tokenizer_hash"]:
        raise UserError(
            f"train.init_from={run.dir} was trained with a different tokenizer: set "
            f"tokens.tokenizer={run.tokenizer}, or name a run with this run's tokenizer"
        )
    trained = run.load_model()
    here, there = (
        {name: tuple(parameter.shape) for name, parameter in each.named_parameters()}
        for each in (model, trained)
    )
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            raise UserError(
                f"train.init_from={run.dir} does not fit this run: {name} is {there.get(name, 'missing')} there "
                f"and {here.get(name, 'missing')} here; set size=, model.* and variant= as in {run.config_file}"
            )
    model.load_state_dict(trained.state_dict(), strict=False)  # the gain may be in one of them only
