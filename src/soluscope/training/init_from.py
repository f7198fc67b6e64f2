"""A run that starts with the weights of a finished run (train.init_from) instead of random ones."""

from __future__ import annotations

from soluscope.config import Config
from soluscope.data.cache import TokenCache
from soluscope.errors import UserError
from soluscope.model import LanguageModel
from soluscope.runs.folder import Run
from soluscope.runs.weights import Facts, Origin, first_misfit


def origin_of(config: Config) -> Origin | None:
    """Return the origin of the initial weights, or None for random weights.

    Raises:
        UserError: if train.init_from is not the folder of a finished run.
    """
    if config.init_dir is None:
        return None
    facts = _facts_of(Run(config.init_dir))
    earlier = facts.init_from or Origin("", "", 0, 0)
    return Origin(
        f"{facts.study}/{facts.run}",
        facts.config,
        facts.steps + earlier.steps,
        facts.tokens + earlier.tokens,
    )


def _facts_of(run: Run) -> Facts:
    """Return the facts of a run; if it is not finished, name the setting in the error."""
    try:
        return run.facts
    except UserError as error:
        raise UserError(f"train.init_from: {error}") from error


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
    run = Run(config.init_dir)
    if _facts_of(run).tokenizer_hash != cache.meta["tokenizer_hash"]:
        raise UserError(
            f"train.init_from={run.dir} was trained with a different tokenizer: set "
            f"tokens.tokenizer={run.tokenizer}, or name a run with this run's tokenizer"
        )
    trained = run.load_model()
    misfit = first_misfit(dict(model.named_parameters()), dict(trained.named_parameters()))
    if misfit:
        name, here, there = misfit
        raise UserError(
            f"train.init_from={run.dir} does not fit this run: {name} is {there} there and {here} here; set "
            f"size=, model.* and variant= as in {run.config_file}"
        )
    model.load_state_dict(trained.state_dict(), strict=False)  # the gain may be in one of them only
