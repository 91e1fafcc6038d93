"""``nestling sweep``: a method's settings searched by its own validation rows. Test rows are not even loaded.

Each trial is a run folder, trained by ``fit`` and resumable like any other; which were tried stands in Optuna's store,
an SQLite file in the sweep's folder or a database that several machines share.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nestling.commands.judges import ByRule, BySelection, Judge
from nestling.commands.train import answer, default_folder, say, settings
from nestling.commands.words import aligned, program
from nestling.config import apply, load_toml, merge, parse_assignments, to_toml
from nestling.engine.runfolder import RunFolder, flat
from nestling.errors import DivergedError, StorageError, UsageError, missing_extra
from nestling.files import write_bytes, write_json, write_text
from nestling.methods import Coins, recipe_class
from nestling.provenance import provenance
from nestling.seeds import derive

if TYPE_CHECKING:
    import optuna

    from nestling.commands.pipeline import Pipeline
    from nestling.engine.plan import StagePlan
    from nestling.options import Sweep

SHOWN = 5
"""Of the best trials, at the end."""


def sweep(command: Sweep) -> int:
    """Run the command. Everything is checked before anything is written."""
    options, fields = settings(command)
    if command.trials < 1:
        raise UsageError(f"--trials must be at least 1, got {command.trials}")
    ranges = ranges_of(options["method"], fields)
    out = Path(command.out or f"{default_folder(options, fields)}-sweep")
    try:
        import optuna
    except ImportError:
        raise missing_extra("optuna", "sweep", "nestling sweep") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with RunFolder(out) as folder:
        from nestling.commands.pipeline import Pipeline

        options = {**options, "searched": list(ranges)}
        pipeline = Pipeline(folder, options, fields, command.data_dir, command.device, command.workers, command.compile)
        Search(pipeline, ranges, fields, command.storage).run(command.trials)
    answer(str(out))
    return 0


def ranges_of(method: str, fields: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    """The ranges that the recipe declares, less the fields that were set. Raises UsageError where none is left."""
    declared = apply(recipe_class(method)(), fields).searched
    given = flat(fields)
    ranges = {name: ends for name, ends in declared.items() if name not in given}
    if not ranges:
        raise UsageError(
            f"there is nothing to search: with these settings {method} declares {', '.join(declared) or 'no field'}, "
            "and all of them are set: leave one out"
        )
    return ranges


class Search:
    """A study in the folder whose lock is held."""

    def __init__(
        self, pipeline: Pipeline, ranges: Mapping[str, tuple[float, ...]], fields: Mapping[str, Any], url: str | None
    ) -> None:
        from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

        self.pipeline, self.fields, self.url = pipeline, fields, url
        self.out = pipeline.folder.path
        self.ranges: dict[str, BaseDistribution] = {
            name: FloatDistribution(*ends, log=True) if len(ends) == 2 else CategoricalDistribution(ends)
            for name, ends in ranges.items()
        }
        self.grid = [dict(zip(ranges, values)) for values in product(*ranges.values())] if is_grid(ranges) else []
        """Every setting, where they can be counted."""
        self.train, self.validation = pipeline.rows.load_training()
        stages = self.plan({name: ends[0] for name, ends in ranges.items()})
        self.judge: Judge = (
            ByRule(pipeline, self.train, self.validation)
            if isinstance(pipeline.recipe, Coins)
            else BySelection(stages, pipeline.recipe.method)
        )

    def recipe(self, values: Mapping[str, float]) -> Any:
        """The recipe of a trial."""
        changes = parse_assignments(f"{name}={value!r}" for name, value in values.items())
        return apply(self.pipeline.recipe, changes)

    def plan(self, values: Mapping[str, float]) -> list[StagePlan]:
        """The stages of a trial; raises what it could not do."""
        return self.pipeline.check(self.train, self.validation, self.recipe(values))

    def run(self, trials: int) -> None:
        """Train what is left of so many trials, and write what came out."""
        from optuna.samplers import TPESampler
        from optuna.trial import TrialState

        folder = self.pipeline.folder
        if folder.kept("token") is None:
            folder.derive("token", secrets.token_hex(16), "this folder's name in a store that several machines share")
        if not folder.begun:
            folder.begin()
        study = self.study()
        over = (TrialState.COMPLETE, TrialState.FAIL)
        while True:
            found = study.get_trials(deepcopy=False)
            done = sum(trial.state in over for trial in found)
            mine = [t for t in found if t.state == TrialState.RUNNING and self.is_mine(t)]
            left = [values for values in self.grid if values not in [trial.params for trial in found]]
            if done >= trials or (self.grid and not (left or mine)):
                break
            if mine:
                number, values = mine[0].number, mine[0].params
            else:
                # A function of how many there are: a resumed sweep goes on as an unbroken one.
                study.sampler = TPESampler(seed=derive(self.pipeline.seed, "sweep", len(found)) % 2**32)
                if left:
                    study.enqueue_trial(left[0])
                trial = study.ask(self.ranges)
                trial.set_user_attr("token", folder.kept("token"))
                number, values = trial.number, trial.params
            most = min(trials, len(self.grid)) if self.grid else trials
            said = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            say(f"--- trial {done + 1} of {most} (number {number}): {said}")
            try:
                study.tell(number, self.score(number, values), skip_if_finished=True)
            except DivergedError as error:
                say(str(error))
                study.tell(number, state=TrialState.FAIL, skip_if_finished=True)
        self.write(study)

    def is_mine(self, trial: optuna.trial.FrozenTrial) -> bool:
        """Whether a trial that was begun is one of this folder's, whose lock says that nobody trains it now.

        By a token in place of a path, which another machine's folder may have too.
        """
        return self.url is None or trial.user_attrs.get("token") == self.pipeline.folder.kept("token")

    def study(self) -> optuna.Study:
        """The study in its store. Raises StorageError where there is none to be had."""
        import optuna
        from sqlalchemy.exc import SQLAlchemyError

        url = self.url or f"sqlite:///{self.out.resolve() / 'study.db'}"
        name = str(derive(0, "study", to_toml({"given": self.pipeline.folder.given})))
        direction = "maximize" if self.judge.mode == "max" else "minimize"
        try:
            return optuna.create_study(study_name=name, storage=url, direction=direction, load_if_exists=True)
        except (SQLAlchemyError, ValueError, ImportError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise StorageError(f"cannot use the store {url}: {reason:.200}; check --storage") from error

    def score(self, number: int, values: Mapping[str, float]) -> float:
        """What validation rows say of the epoch that the trial keeps; trains, or reads a finished trial back."""
        run = self.pipeline.fit(self.recipe(values), self.train, self.validation, self.trial_folder(number))
        return self.judge.score(run)

    def trial_folder(self, number: int) -> Path:
        return self.out / "trials" / f"{number:04d}"

    def write(self, study: optuna.Study) -> None:
        """sweep.json, the figure, the best settings as a configuration, and a table of the best on the terminal."""
        from nestling.report.sweep import draw

        trials = [
            {
                "number": trial.number,
                "fields": trial.params,
                "value": trial.value,
                "folder": str(self.trial_folder(trial.number).relative_to(self.out)) if self.is_mine(trial) else None,
            }
            for trial in study.get_trials(deepcopy=False)
            if trial.state.is_finished()
        ]
        if not self.judge.ranked(trials):
            raise DivergedError("every trial diverged: set a lower optimizer.lr")
        chosen, how = self.judge.choose(trials)
        given = load_toml(self.pipeline.folder.recipe)["given"]
        given.pop("searched", None)
        best = merge(given, parse_assignments(f"{name}={value!r}" for name, value in chosen["fields"].items()))
        write_text(self.out / "best.toml", f"# trial {chosen['number']} of {len(trials)}\n{to_toml({'given': best})}")
        result = {
            "metric": self.judge.metric,
            "mode": self.judge.mode,
            **how,
            "best": chosen,
            "trials": trials,
            **provenance(self.pipeline.recipe.method, self.pipeline.seed, 0.0),
        }
        del result["seconds"]
        write_json(self.out / "sweep.json", result)
        write_bytes(self.out / "sweep.png", draw(result))
        answer("\n".join(best_lines(result)))
        answer(f"the best: {program()} train --config {self.out / 'best.toml'}; figure: {self.out / 'sweep.png'}")


def best_lines(result: Mapping[str, Any]) -> Sequence[str]:
    """The best trials of a sweep.json as an aligned table."""
    sign = -1 if result["mode"] == "max" else 1
    known = sorted((t for t in result["trials"] if t["value"] is not None), key=lambda t: sign * t["value"])
    names = list(known[0]["fields"])
    # The one that is chosen is shown, wherever it stands.
    shown = [t for place, t in enumerate(known) if place < SHOWN or t["number"] == result["best"]["number"]]
    rows = [[str(t["number"]), *(f"{t['fields'][name]:.4g}" for name in names), f"{t['value']:.4f}"] for t in shown]
    failed = len(result["trials"]) - len(known)
    ended = f"{len(known)} trials" + (f", and {failed} diverged" if failed else "")
    lines = [f"{ended}; {result['metric']} on validation rows", *aligned([["trial", *names, "score"], *rows], 1)]
    if "rule" in result:
        picked = ", ".join(f"{name}: {value:g}" for name, value in result["choices"].items())
        lines.append(f"trial {result['best']['number']} is chosen, {result['rule']}; {names[0]} by {picked}")
        if len(known) > 1 and len({t["value"] for t in known}) == 1:
            lines.append("warning: all trials score the same on validation rows: there was nothing to choose by")
    return lines


def is_grid(ranges: Mapping[str, tuple[float, ...]]) -> bool:
    """Whether every field has values to be tried, in place of a range."""
    return all(len(ends) != 2 for ends in ranges.values())
