"""`python -m stages.train`: train, keep the best weights, record the run."""

from __future__ import annotations

from runkey import paths
from runkey.data.loader import build_train_loader
from runkey.errors import report_errors
from runkey.identity.key import make_recipe, short_key
from runkey.memory.plan import PLAN, read_plan
from runkey.model.detr import build_model
from runkey.model.weights import load_initial_weights
from runkey.params import load_params
from runkey.training.device import choose_device
from runkey.training.loop import fit
from runkey.training.seed import set_up
from stages._parts import build_validation
from stages._record import Run, keep, recorded


def main() -> None:
    """Write model/, run.json, logs/, plots/ and metrics/train.json."""
    root = paths.workspace()
    params = load_params(root / paths.PARAMS)
    recipe = make_recipe("train", root, params)
    device, reason = choose_device(params.runtime.device)
    print(f"key {short_key(recipe.key)}; device {device} ({reason})")
    plan = read_plan(root / paths.MEMORY / PLAN, params.training.batch_size)
    set_up(
        params.seed,
        deterministic=params.training.deterministic,
        cpu_threads=params.training.cpu_threads,
    )
    validation = build_validation(params, params.model, root, device)
    classes = validation.classes
    model = build_model(params.model, len(classes))
    for line in load_initial_weights(model, params.model, [c.name for c in classes], root).lines():
        print(line)
    loader = build_train_loader(
        params.data,
        prepared=root / paths.PREPARED,
        root=root,
        seed=params.seed,
        batch_size=params.training.batch_size,
        micro_batch=plan.micro_batch,
        max_objects=params.model.num_queries,
        workers=params.runtime.workers,
        prefetch=params.runtime.prefetch,
        pin_memory=params.runtime.pin_memory,
        say=print,
    )
    run = Run(params, root, recipe, plan, device, validation.precision.dtype, classes)
    with recorded(run) as tracker:
        result = fit(
            model,
            validation.criterion,
            loader,
            validation.metrics,
            params,
            device=device,
            tracker=tracker,
            say=print,
        )
        run_id = keep(run, result, tracker)
    print(f"trained in {result.seconds:.0f} s; model/ is written; MLflow run {run_id or 'none'}")


if __name__ == "__main__":
    with report_errors():
        main()
