"""The commands, their options and their help."""

import math
from pathlib import Path
from typing import Annotated, Any

import typer

import hydragrad
from hydragrad.attributing import attribute as attribute_run
from hydragrad.attribution import Attribution
from hydragrad.commands.console import Refusing, console, interactive, say
from hydragrad.commands.options import (
    Blocks,
    Disk,
    Fraction,
    Memory,
    Method,
    MethodOption,
    Replays,
    RunFolder,
    ScoresFile,
    ShownQueries,
    Smoothing,
    TaskName,
    TaskOption,
    amount,
    file_to_write,
    known_queries,
)
from hydragrad.commands.proving import validate
from hydragrad.commands.reporting import report
from hydragrad.commands.suspicion import mislabels
from hydragrad.planning import plan
from hydragrad.report.tables import ranking_table
from hydragrad.retraining.measuring import losses_at
from hydragrad.run import Run
from hydragrad.tasks.naming import resolve_task
from hydragrad.tasks.task import Task
from hydragrad.tasks.training import train as train_task
from hydragrad.verification import verify as verify_run

app = typer.Typer(
    cls=Refusing,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # a bug shows Python's own traceback
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        say(f"hydragrad {hydragrad.__version__}")
        raise typer.Exit


@app.callback()
def hydragrad_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Which training examples made the model do this, and by how much would the answer change without them?

    [bold]Start here:[/bold]   hydragrad demo

    [bold]Then, on a task:[/bold]

        hydragrad train digits --out runs/digits
        hydragrad verify runs/digits --task digits
        hydragrad attribute runs/digits --task digits --query 3 --top 10 --out scores.safetensors
        hydragrad validate runs/digits --task digits --scores scores.safetensors
        hydragrad mislabels runs/digits --task digits
        hydragrad report runs/digits --task digits --scores scores.safetensors

    A training loop of your own is recorded from Python: see hydragrad.record.
    """


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the page, the run and the scores.")] = Path(
        "demo-output"
    ),
    train_size: Annotated[int, typer.Option(hidden=True)] = 1437,
    test_size: Annotated[int, typer.Option(hidden=True)] = 360,
    epochs: Annotated[int, typer.Option(hidden=True)] = 15,
    removed: Annotated[int, typer.Option(hidden=True)] = 20,
) -> None:
    """See it work: digits with wrong labels, three methods, real retraining, a page. A minute or two.

    Trains a small network on handwritten digits of which a tenth have a wrong label, attributes all test images by
    all three methods, checks the scores against really training without some examples, and writes a page that shows
    the training images behind the worst mistakes.

        hydragrad demo
        hydragrad demo --out demo-output
    """
    from hydragrad.commands.demo import run_demo
    from hydragrad.tasks.digits import digits

    task = digits(flipped=0.1, train_size=train_size, test_size=test_size, epochs=epochs)
    run_demo(out, task, removed=removed)


@app.command()
def train(
    task: TaskName,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the recorded run.", show_default=False)],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run that is there already.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where a killed run stopped; give it from the beginning.")
    ] = False,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps between stored states.")] = 100,
) -> None:
    """Train a task by an ordinary loop and record the run.

        hydragrad train digits --out runs/digits
        hydragrad train my_tasks.py:small --out runs/small --overwrite
        hydragrad train digits --out runs/long --resume

    A task is a few lines of Python (in my_tasks.py):

        small = hydragrad.Task("small", model=make_model, loss=loss, train=train_set, test=test_set,
                               optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
    """
    chosen = resolve_task(task)
    say(f"{chosen}: {chosen.epochs} epochs in batches of {chosen.batch_size}, seed {chosen.seed}")
    run = train_task(
        chosen, out, overwrite=overwrite, resume=resume, checkpoint_every=checkpoint_every, progress=interactive()
    )
    for step, dropped in run.trajectory.resumptions:
        say(f"gone on from step {step}; {dropped} recorded steps after it were taken again")
    told = "no test examples: nothing to ask about"
    if len(chosen.test):
        test_loss = float(losses_at(run, run.trajectory.state(run.num_steps), chosen.test).mean())
        told = f"mean test loss {test_loss:.4f}"
        told += "" if math.isfinite(test_loss) else ": the run diverged, or its data is not finite"
    say(
        f"recorded {run.num_steps} steps in {out}; {told}",
        f"next: hydragrad attribute {out} --task {task}",
    )


@app.command()
def verify(run: RunFolder, task: TaskOption) -> None:
    """Replay a recorded run and say whether it comes out as recorded, bit for bit. Exit code 1 if it does not.

    hydragrad verify runs/digits --task digits
    """
    found = verify_run(resolve_task(task).load(run))
    say(str(found))
    raise typer.Exit(0 if found else 1)


@app.command()
def attribute(
    run: RunFolder,
    task: TaskOption,
    method: MethodOption = Method.exact,
    out: ScoresFile = None,
    query: ShownQueries = None,
    top: Annotated[int, typer.Option(min=1, help="How many training examples to show.")] = 10,
    memory: Memory = None,
    disk: Disk = None,
    replays: Replays = None,
    check: Annotated[bool, typer.Option(help="Check the scores against retraining: four replays.")] = True,
    resume: Blocks = None,
    smoothing: Smoothing = None,
    fraction: Fraction = None,
) -> None:
    """Score every training example for every test example of a task, and show the most helpful and harmful.

    A score is how much the loss on a test example would rise without the training example. Positive: it helped.
    Negative: it did harm. The verdict says whether scores of this run can be believed.

        hydragrad attribute runs/digits --task digits --query 3 --top 10
        hydragrad attribute runs/digits --task digits --method gauss-newton --out scores.safetensors
        hydragrad attribute runs/digits --task digits --resume runs/digits-scores --out scores.safetensors
        hydragrad attribute runs/digits --task digits --memory 2GB --disk 10GB --replays 3
        hydragrad attribute runs/digits --task digits --smoothing 8 --out scores.safetensors

    Read saved scores in Python: hydragrad.Attribution.load("scores.safetensors").
    """
    chosen = resolve_task(task)
    known_queries(query, len(chosen.test))
    file_to_write(out, "--out")
    bound = chosen.load(run)
    budgets: dict[str, Any] = {
        "memory": amount(memory, "--memory"),
        "disk": amount(disk, "--disk"),
        "replays": replays,
    }
    if resume is None:
        say(f"plan: {plan(bound, len(chosen.test), method.value, smoothing=smoothing, **budgets)}")
    else:
        say(f"finished blocks are kept in {resume}")
    scores = attribute_run(
        bound,
        chosen.test,
        method=method.value,
        **budgets,
        check=check,
        progress=interactive(),
        resume=resume,
        smoothing=smoothing,
        fraction=fraction,
    )
    say("", str(scores.diagnostics), "")
    _show(scores, chosen, bound, query or [], top)
    if out is not None:
        say(
            f"saved {' x '.join(map(str, scores.values.shape))} scores: {scores.save(out)}",
            f"next: hydragrad validate {run} --task {task} --scores {out}",
        )


def _show(scores: Attribution, task: Task, run: Run, queries: list[int], top: int) -> None:
    views = [(f"test example {query}", scores, query) for query in queries]
    if not queries:
        views = [(f"the mean over {len(task.test)} test examples", scores.averaged(), 0)]
    for words, view, query in views:
        for title, largest in (("Helped most", True), ("Harmed most", False)):
            say(f"{title}: {words}")
            console.print(ranking_table(view.top(query, top, largest=largest), run.problem.data, task.true_labels))


app.command()(validate)
app.command()(mislabels)
app.command()(report)
