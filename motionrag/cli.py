"""The command line: typed functions, each a thin call into the Python API. `--help` of each shows an example.

Results go to standard output, progress and warnings to standard error. Exit codes: 0 done, 1 failed, 2 wrong usage.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from motionrag.database import Reference
    from motionrag.pocket.demo import DemoResult
    from motionrag.pocket.demo_control import ControlDemoResult

app = typer.Typer(
    name="motionrag",
    help="Motion-retrieval-augmented image-to-video generation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Put --debug anywhere to see the traceback of an error.",
)

pocket_app = typer.Typer(help="The pocket's world: clips to try things on.", no_args_is_help=True)
app.add_typer(pocket_app, name="pocket")
evaluate_app = typer.Typer(help="Measure what retrieval does.", no_args_is_help=True)
app.add_typer(evaluate_app, name="evaluate")

AsJSON = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
DatabasePath = Annotated[Path, typer.Argument(help="Folder of the database.", metavar="DB")]


class Offload(str, Enum):
    """Where the backbone's parts wait while they do not run."""

    none = "none"
    model = "model"
    group = "group"
    sequential = "sequential"


class Precision(str, Enum):
    """Working precision of the backbone, in torch's words or short."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"

    @property
    def torch_name(self) -> str:
        """The name of the dtype in torch."""
        return {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}.get(self.value, self.value)


@app.command(epilog="Example: motionrag index clips/ --captions clips/clips.csv --out db/sports")
def index(
    source: Annotated[Path, typer.Argument(help="Folder, manifest (.csv .tsv .jsonl .parquet) or video.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the database; made if it does not exist.")],
    captions: Annotated[Path | None, typer.Option(help="Manifest with captions for the folder.")] = None,
    encoder: Annotated[
        str | None, typer.Option(help="Bundle: 'pocket', a folder or a hub id. Default: the database's own, or pocket.")
    ] = None,
    text_encoder: Annotated[
        str | None, typer.Option(help="Sentence encoder for retrieval by text, in place of the bundle's.")
    ] = None,
    video_column: Annotated[str | None, typer.Option(help="Column that names the file.")] = None,
    caption_column: Annotated[str | None, typer.Option(help="Column that holds the caption.")] = None,
    reader: Annotated[str, typer.Option(help="Video reader: auto (PyAV), pyav, decord or torchcodec.")] = "auto",
    workers: Annotated[int | None, typer.Option(min=1, help="Decoding processes. Default: by the cores.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Longest time for one clip, in seconds.")] = None,
    device: Annotated[str, typer.Option(help="Where the encoders run.")] = "cpu",
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try again what failed before.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first clip that cannot be read.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")] = False,
    as_json: AsJSON = False,
) -> None:
    """Add clips to a database. The same command again continues where a killed run stopped."""
    from motionrag.database import AddReport, MotionDatabase
    from motionrag.database.manifest import Manifest
    from motionrag.database.sources import list_clips
    from motionrag.encoder import MotionEncoder

    exists = (out / "manifest.json").exists()
    if dry_run and not exists:
        listing = list_clips(source, captions=captions, video_column=video_column, caption_column=caption_column)
        report = AddReport(listing.convention, added=len(listing.clips), failed=listing.failures, dry_run=True)
        total = 0
    else:
        # What is not asked for stays as the database has it.
        stored = Manifest.read(out).encoder if exists else {"source": None, "text_encoder": None}
        chosen = MotionEncoder.from_pretrained(
            encoder or stored["source"] or "pocket", text_encoder=text_encoder or stored["text_encoder"], device=device
        )
        database = MotionDatabase(out, encoder=chosen) if exists else MotionDatabase.create(out, encoder=chosen)
        report = database.add(
            source,
            captions=captions,
            video_column=video_column,
            caption_column=caption_column,
            reader=reader,
            num_workers=workers,
            timeout_s=timeout,
            retry_failed=retry_failed,
            strict=strict,
            dry_run=dry_run,
        )
        total = len(database)
    if as_json:
        _print_json({"database": str(out), **report.to_dict(), "total": total})
        return
    print(f"Took {source} for: {report.convention}")
    print(f"{'Would be' if dry_run else 'Done'}: {report}")
    if not dry_run:
        print(f"{out} holds {total} clips. Search it: motionrag search {out} --text '…'")


@app.command(epilog="Example: motionrag search db/sports --text 'a person rides a bicycle' -k 5 --where \"fps >= 8\"")
def search(
    database: DatabasePath,
    text: Annotated[str | None, typer.Option(help="Compared with the captions.")] = None,
    image: Annotated[Path | None, typer.Option(help="Compared with the first frames.")] = None,
    motion: Annotated[Path | None, typer.Option(help="A video; compared with the clips' motion.")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="How many.")] = 9,
    where: Annotated[str | None, typer.Option(help="SQL condition on the columns.")] = None,
    weight: Annotated[list[str] | None, typer.Option(help="text=0.7; repeat for image and motion.")] = None,
    exclude: Annotated[list[Path] | None, typer.Option(help="A file that must not come back; repeatable.")] = None,
    as_json: AsJSON = False,
) -> None:
    """Find clips by a description, an image, a motion, or a mix of them."""
    from motionrag.database import MotionDatabase
    from motionrag.video import Clip

    if text is None and image is None and motion is None:
        raise typer.BadParameter("pass --text, --image or --motion")
    hits = MotionDatabase(database).search(
        text=text,
        image=image,
        motion=None if motion is None else Clip(str(motion)),
        k=k,
        where=where,
        weights=_weights(weight),
        exclude=exclude,
    )
    if as_json:
        found = [hit.to_dict() for hit in hits]
        _print_json({"database": str(database), "requested": k, "references": found})
    else:
        _print_references(hits)


@app.command(epilog="Example: motionrag generate dog.png --prompt 'a dog runs' --database db/sports --out dog.mp4")
def generate(
    image: Annotated[Path, typer.Argument(help="The first frame.")],
    out: Annotated[Path, typer.Option("--out", help="The video, .mp4 or .gif; a JSON file is written beside it.")],
    prompt: Annotated[str, typer.Option(help="What should happen; also searches the captions.")] = "",
    negative_prompt: Annotated[str | None, typer.Option(help="What should not happen.")] = None,
    database: Annotated[Path | None, typer.Option(help="Where motion is retrieved from.")] = None,
    backbone: Annotated[
        str, typer.Option(help="'pocket[-control]', a bundle, or with --bundle a diffusers model.")
    ] = "pocket",
    bundle: Annotated[str | None, typer.Option(help="Trained parts for the backbone: folder or hub id.")] = None,
    references: Annotated[int, typer.Option(min=0, help="Most references; 0 for the plain backbone.")] = 9,
    scale: Annotated[float, typer.Option(help="Strength of the injected motion.")] = 1.0,
    motion_guidance: Annotated[
        float | None, typer.Option(help="Guidance of the injected motion; 1 is off. Default: the bundle's, or 1.")
    ] = None,
    min_similarity: Annotated[float | None, typer.Option(help="Inject nothing below this similarity.")] = None,
    where: Annotated[str | None, typer.Option(help="SQL condition on the database's columns.")] = None,
    trajectories: Annotated[Path | None, typer.Option(help="Ways that things take: a track file.")] = None,
    canvas: Annotated[
        str | None, typer.Option(help="HEIGHTxWIDTH that the track file was drawn on, where it does not say so.")
    ] = None,
    motion_mask: Annotated[Path | None, typer.Option(help="Picture of the image's size: what may move.")] = None,
    camera: Annotated[str | None, typer.Option(help="Camera move, such as 'pan left'.")] = None,
    control_scale: Annotated[float, typer.Option(help="Strength of trajectories, mask and camera.")] = 1.0,
    control_guidance: Annotated[
        float | None, typer.Option(help="Guidance of the control; 1 is off. Default: the bundle's, or 1.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps. Default: the bundle's, or 50.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance; 1 is off.")] = None,
    frames: Annotated[int | None, typer.Option(help="Number of frames.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    device: Annotated[str, typer.Option(help="Where to run.")] = "cpu",
    dtype: Annotated[Precision, typer.Option(help="Working precision of the backbone.")] = Precision.float32,
    offload: Annotated[Offload, typer.Option(help="Save accelerator memory; needs --device.")] = Offload.none,
    as_json: AsJSON = False,
) -> None:
    """Generate a video from an image, with motion retrieved from a database."""
    import torch

    from motionrag.pipeline import MotionRAGPipeline
    from motionrag.trajectory import read_tracks

    rows, columns = _canvas(canvas)
    if canvas is not None and trajectories is None:
        raise typer.BadParameter("--canvas belongs to --trajectories")
    if offload is not Offload.none and torch.device(device).type == "cpu":
        raise typer.BadParameter(f"--offload {offload.value} moves parts to an accelerator; add --device cuda")
    _hide_loading_bars()
    pipe = MotionRAGPipeline.from_pretrained(
        backbone, bundle=bundle, database=database, dtype=getattr(torch, dtype.torch_name)
    )
    pipe.encoder.to(device)
    if offload is Offload.model:
        pipe.enable_model_cpu_offload(device=device)
    elif offload is Offload.group:
        pipe.enable_group_offload(onload_device=torch.device(device), offload_type="leaf_level")
    elif offload is Offload.sequential:
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.to(device)
    output = pipe(
        image,
        prompt,
        negative_prompt=negative_prompt,
        num_references=references,
        motion_scale=scale,
        motion_guidance_scale=motion_guidance,
        min_similarity=min_similarity,
        where=where,
        trajectories=() if trajectories is None else read_tracks(trajectories, height=rows, width=columns),
        motion_mask=motion_mask,
        camera=camera,
        control_scale=control_scale,
        control_guidance_scale=control_guidance,
        num_inference_steps=steps,
        guidance_scale=guidance,
        num_frames=frames,
        height=height,
        width=width,
        generator=torch.Generator().manual_seed(seed),
    )
    [video] = output.save(out)
    if as_json:
        _print_json({"video": str(video), **output.to_dict()})
        return
    _print_references(output.references)  # type: ignore[arg-type] # one image: one list
    if output.abstained:
        print("No clip was similar enough: this is the plain backbone's video.")
    if output.motion_tokens is not None:
        guided = f"guidance {output.settings['motion_guidance_scale']:g}"
        print(f"Injected effect: {output.injected_effect.mean:.3f} of the attention's output, {guided}.")
    if output.settings["control_scale"] is not None:
        guided = f"guidance {output.settings['control_guidance_scale']:g}"
        print(f"Control: {', '.join(output.settings['control'])}, strength {control_scale:g}, {guided}.")
    print(f"Written: {video}")
    if not pipe.bundle.config.trained:
        print("These weights are untrained: the video shows that everything runs, no more.", file=sys.stderr)


@app.command(epilog="Example: motionrag info db/sports")
def info(
    target: Annotated[
        str | None, typer.Argument(help="Database or bundle; without it, the versions of what is installed.")
    ] = None,
    as_json: AsJSON = False,
) -> None:
    """Describe a database, a bundle, or this installation."""
    facts = _describe(target)
    if as_json:
        _print_json(facts)
        return
    for name, value in facts.items():
        print(f"{name:14} {value if isinstance(value, (str, int, float)) else json.dumps(value, ensure_ascii=False)}")


@app.command(epilog="Example: motionrag verify db/sports")
def verify(
    database: DatabasePath,
    quick: Annotated[bool, typer.Option("--quick", help="Do not read vectors or compare checksums.")] = False,
    as_json: AsJSON = False,
) -> None:
    """Look for damage in a database. Exit code 1 if any is found."""
    from motionrag.database import MotionDatabase

    findings = MotionDatabase(database).verify(deep=not quick)
    if as_json:
        _print_json({"database": str(database), "ok": not findings, "findings": findings})
    else:
        for finding in findings:
            print(finding)
        print(f"{len(findings)} findings in {database}" if findings else f"{database} is sound.")
    if findings:
        raise typer.Exit(1)


@app.command(epilog="Example: motionrag compact db/sports")
def compact(database: DatabasePath) -> None:
    """Join small files of a database, and remove old versions and what killed runs left behind."""
    from motionrag.database import MotionDatabase

    opened = MotionDatabase(database)
    before = opened.info()["bytes"]
    opened.compact()
    print(f"{database}: {before} bytes before, {opened.info()['bytes']} now.")


@app.command(
    epilog="Example: motionrag demo --out outputs/demo, or: motionrag demo clips/ --captions clips/clips.csv, "
    "or: motionrag demo --control"
)
def demo(
    clips: Annotated[Path | None, typer.Argument(help="Folder or manifest; default: three rendered domains.")] = None,
    captions: Annotated[Path | None, typer.Option(help="Captions for the folder.")] = None,
    image: Annotated[
        Path | None, typer.Option(help="Image to start from; default: an unseen scene, or a clip's first frame.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="What should happen; default: names no motion, or that clip's caption.")
    ] = None,
    control: Annotated[
        bool, typer.Option("--control", help="Drag the things of a scene, or of --image, along ways instead.")
    ] = False,
    tracks: Annotated[Path | None, typer.Option(help="With --control and --image: a track file, the ways.")] = None,
    bundle: Annotated[str | None, typer.Option(help="With --control: bundle to use. Default: pocket-control.")] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Where everything is written. Default: outputs/demo or outputs/demo-control."),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps. Default: the pipeline's.")] = None,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    as_json: AsJSON = False,
) -> None:
    """Generate from one image without retrieval and under each database: three domains, or your clips.

    With --control, from one image without and with ways for its things: a scene's, or your --tracks for your --image.
    """
    if control:
        if any(given is not None for given in (clips, captions, prompt)):
            raise typer.BadParameter("--control retrieves nothing of yours; leave out CLIPS, --captions and --prompt")
        _demo_control(image, tracks, bundle, out or Path("outputs/demo-control"), steps, seed, as_json)
        return
    if tracks is not None or bundle is not None:
        raise typer.BadParameter("--tracks and --bundle belong to --control")
    from motionrag.pocket.demo import run_demo

    _hide_loading_bars()
    out = out or Path("outputs/demo")
    done = run_demo(clips, captions=captions, image=image, prompt=prompt, out=out, num_inference_steps=steps, seed=seed)
    if as_json:
        print(done.report.read_text(encoding="utf-8"), end="")
        return
    print(f"Without retrieval{_errors_in_words(done.plain_track_errors)}")
    for result in done.results:
        print(f"With {result.source.name}, {result.index}{_errors_in_words(result.track_errors)}")
        _print_references(result.references)
        if result.output.abstained:
            print("No clip was similar enough: this is the video without retrieval.")
        print(f"Injected effect: {result.output.injected_effect.mean:.3f} of the attention's output.")
    _print_outcome(done)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Example: motionrag train --config configs/pocket/injection.yaml --devices 1 --trainer.max_steps=100",
)
def train(
    context: typer.Context,
    config: Annotated[Path, typer.Option("--config", help="YAML file, such as those in configs/.")],
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint of this config.")] = False,
    devices: Annotated[str | None, typer.Option(help="How many on each node, or auto. Default: the config's.")] = None,
    num_nodes: Annotated[int | None, typer.Option(min=1, help="Machines. Default: the config's.")] = None,
    strategy: Annotated[
        str | None, typer.Option(help="Of Lightning, such as ddp or fsdp. Default: the config's.")
    ] = None,
) -> None:
    """Train by a config. Further --trainer.x=…, --model.init_args.x=… and --data.init_args.x=… win over the file."""
    with _needs_lightning():
        from motionrag.training.run import train as run

    _hide_loading_bars()
    given = {"devices": devices, "num_nodes": num_nodes, "strategy": strategy}
    options = [f"--trainer.{name}={value}" for name, value in given.items() if value is not None]
    model = run(config, resume=resume, overrides=[*options, *context.args])
    print(f"Done: {type(model).__name__} by {config}, {model.trainer.global_step} steps.")


@app.command("new-bundle", epilog="Example: motionrag new-bundle THUDM/CogVideoX-5b-I2V --out bundles/cogvideox")
def new_bundle(
    base_model: Annotated[str, typer.Argument(help="Diffusers pipeline to train for: hub id or folder.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the bundle; must not exist.")],
    control: Annotated[bool, typer.Option("--control", help="With feature modulation, to be dragged (SVD).")] = False,
    seed: Annotated[int, typer.Option(help="Of the weights.")] = 0,
) -> None:
    """Make an untrained bundle of the published sizes, to train from scratch."""
    with _needs_lightning():
        from motionrag.training.start import new_bundle as make

    _hide_loading_bars()
    make(base_model, out, control=control, seed=seed)
    print(f"{out} is ready to be trained: motionrag train --config configs/…, see docs/training.md")


@app.command(
    epilog="Example: motionrag convert motion_proj.ckpt motion_transformer.ckpt Motion-Adapter.ckpt "
    "--backbone cogvideox --base-model THUDM/CogVideoX-5b-I2V --sos-token zeros --out bundles/cogvideox"
)
def convert(
    files: Annotated[list[Path], typer.Argument(help="Published checkpoints; what they hold is recognised.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the bundle; must not exist.")],
    backbone: Annotated[str, typer.Option(help="Family that the files were made for: cogvideox or svd.")],
    base_model: Annotated[str, typer.Option(help="Diffusers pipeline of that family: hub id or folder.")],
    sos_token: Annotated[
        str | None, typer.Option(help="'zeros' or a file with it, for a motion_transformer.ckpt that has none.")
    ] = None,
    licence: Annotated[str, typer.Option(help="Of the published files, such as MIT; written into the bundle.")] = "",
    head_dim: Annotated[
        int, typer.Option(min=1, help="Channels of an attention head; 64 in all published files.")
    ] = 64,
    as_json: AsJSON = False,
) -> None:
    """Make a bundle of published MotionRAG weights, or of a subset of them. Nothing is downloaded."""
    from motionrag.conversion import convert_files

    report = convert_files(
        files,
        out,
        backbone=backbone,
        base_model=base_model,
        sos_token=sos_token,
        licence=licence,
        head_dim=head_dim,
    )
    if as_json:
        _print_json(report.to_dict())
        return
    print(report)
    print(f"{out} is written: motionrag info {out}")


@pocket_app.command(epilog="Example: motionrag pocket render --domain blick --count 100 clips/")
def render(
    out: Annotated[Path, typer.Argument(help="Folder for the videos and captions.csv.")],
    domain: Annotated[str, typer.Option(help="A made-up verb; it decides how everything moves.")],
    count: Annotated[int, typer.Option(min=1, help="How many clips.")] = 100,
    family: Annotated[
        str | None, typer.Option(help="Motion family, such as orbit or fall. Default: what the verb stands for.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the scenes.")] = 0,
    truth: Annotated[bool, typer.Option("--truth", help="Also write tracks, masks and flow as .npz.")] = False,
) -> None:
    """Render clips of a domain, 64 pixels and 17 frames each, in which everything moves the same way."""
    from motionrag.pocket.folder import render_domain
    from motionrag.pocket.world import named_domain

    captions = render_domain(out, named_domain(domain, family=family), count, seed=seed, truth=truth)
    print(f"{count} clips. Index them: motionrag index {out} --captions {captions} --out db/{domain}")


@pocket_app.command("mc-bench", epilog="Example: motionrag pocket mc-bench outputs/pocket-bench --items 12")
def pocket_mc_bench(
    out: Annotated[Path, typer.Argument(help="Folder; gets bench/ and videos/.")],
    items: Annotated[int, typer.Option(min=1, help="How many scenes.")] = 12,
    seed: Annotated[int, typer.Option(min=0, help="Of the scenes.")] = 0,
) -> None:
    """Write scenes with their true ways as an MC-Bench folder, and the true videos, to try the evaluation on."""
    from motionrag.evaluation.mc_bench_pocket import write_pocket_bench

    bench, videos = write_pocket_bench(out, items=items, seed=seed)
    print(f"{items} items. Measure their true videos: motionrag evaluate mc-bench {bench} {videos} --out {out}/figures")


@pocket_app.command("train", epilog="Example: motionrag pocket train")
def pocket_train(
    only: Annotated[list[str] | None, typer.Option(help="A step to run, again if it is done; repeatable.")] = None,
    configs: Annotated[Path, typer.Option(help="Folder of the trainings' configs.")] = Path("configs/pocket"),
    from_shipped: Annotated[
        bool, typer.Option("--from-shipped", help="Begin with the package's weights instead of random ones.")
    ] = False,
) -> None:
    """Make the pocket's weights from nothing, in a checkout of the project. Killed, the same command continues."""
    from motionrag.pocket.recipe import train_pocket

    for step, seconds in train_pocket(configs, only=only or (), from_shipped=from_shipped).items():
        print(f"{step:18} {seconds:8.0f} s")


@evaluate_app.command("pocket", epilog="Example: motionrag evaluate pocket --quick --out outputs/evaluation")
def evaluate_pocket(
    out: Annotated[Path, typer.Option("--out", help="Where everything is written; a stopped run continues.")] = Path(
        "outputs/evaluation"
    ),
    backbone: Annotated[str, typer.Option(help="'pocket' or the folder of a bundle like it.")] = "pocket",
    quick: Annotated[bool, typer.Option("--quick", help="A few clips of everything, in a minute or two.")] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps. Default: the pipeline's.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance; 1 is off.")] = None,
    motion_guidance: Annotated[
        float | None, typer.Option(help="Guidance of the injected motion; 1 is off. Default: the bundle's, or 1.")
    ] = None,
    domains: Annotated[int | None, typer.Option(min=1, help="Domains in each column.")] = None,
    queries: Annotated[int | None, typer.Option(min=1, help="Queries for each domain.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Noises for each query.")] = None,
    column: Annotated[
        list[str] | None, typer.Option(help="seen, held-out-parameters or held-out-families; repeatable.")
    ] = None,
    dtype: Annotated[Precision, typer.Option(help="Working precision of the backbone.")] = Precision.float32,
    as_json: AsJSON = False,
) -> None:
    """Compare no retrieval, plain tokens, CAMA and the ceiling with the truth, and swap databases."""
    from dataclasses import replace

    import torch

    from motionrag.evaluation import QUICK, Sizes, evaluate_pocket
    from motionrag.pipeline import MotionRAGPipeline

    _hide_loading_bars()
    pipe = MotionRAGPipeline.from_pretrained(backbone, dtype=getattr(torch, dtype.torch_name))
    given = {"domains": domains, "queries": queries, "seeds": seeds}
    sizes = replace(QUICK if quick else Sizes(), **{name: value for name, value in given.items() if value is not None})
    options = {} if column is None else {"columns": column}
    report = evaluate_pocket(
        pipe,
        out=out,
        sizes=sizes,
        num_inference_steps=steps,
        guidance_scale=guidance,
        motion_guidance_scale=motion_guidance,
        **options,
    )
    if as_json:
        _print_json(report.summary)
        return
    print(report.table)
    print(f"Per-clip figures, summary and table: {report.folder}")


@evaluate_app.command("pocket-control", epilog="Example: motionrag evaluate pocket-control --steps 10 --dtype bfloat16")
def evaluate_pocket_control(
    out: Annotated[Path, typer.Option("--out", help="Where everything is written; a stopped run continues.")] = Path(
        "outputs/evaluation-control"
    ),
    bundle: Annotated[str, typer.Option(help="'pocket-control' or the folder of a bundle like it.")] = "pocket-control",
    scenes: Annotated[int, typer.Option(min=1, help="Scenes of each part.")] = 72,
    noises: Annotated[int, typer.Option(min=1, help="Noises for each scene.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Of scenes and noises.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps. Default: the pipeline's.")] = None,
    dtype: Annotated[Precision, typer.Option(help="Working precision of the backbone.")] = Precision.float32,
    as_json: AsJSON = False,
) -> None:
    """Drag things of unseen scenes: do they go where they shall, does all else stay, and does retrieval fit in?"""
    import torch

    from motionrag.evaluation import ControlSizes, evaluate_pocket_control
    from motionrag.pipeline import MotionRAGPipeline

    _hide_loading_bars()
    pipe = MotionRAGPipeline.from_pretrained(bundle, dtype=getattr(torch, dtype.torch_name))
    sizes = ControlSizes(scenes=scenes, noises=noises, seed=seed)
    report = evaluate_pocket_control(pipe, out=out, sizes=sizes, num_inference_steps=steps)
    if as_json:
        _print_json(report.summary)
        return
    print(report.table)
    print(f"Per-clip figures, report and sheet: {report.folder}")


@evaluate_app.command(
    "mc-bench", epilog="Example: motionrag evaluate mc-bench MC-Bench/ videos/ --out outputs/mc-bench"
)
def evaluate_mc_bench(
    root: Annotated[Path, typer.Argument(help="The benchmark: CATEGORY/ITEM/meta_data.json and its images.")],
    videos: Annotated[Path, typer.Argument(help="CATEGORY/ITEM.mp4, or one video in CATEGORY/ITEM/.")],
    out: Annotated[Path, typer.Option("--out", help="Where figures are written; a stopped run continues.")],
    tracker: Annotated[
        str, typer.Option(help="optical-flow, raft, or cotracker where it is installed.")
    ] = "optical-flow",
    tracker_weights: Annotated[Path | None, typer.Option(help="Of a learned tracker.")] = None,
    frames: Annotated[int, typer.Option(min=1, max=15, help="Frames compared with frame 0.")] = 15,
    panels: Annotated[bool, typer.Option("--panels", help="Five pictures side by side; the last one counts.")] = False,
    image_encoder: Annotated[
        str | None, typer.Option(help="'pocket' or a bundle, for frame consistency and MD-Img. Default: without them.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where a learned tracker and the image encoder run.")] = "cpu",
    as_json: AsJSON = False,
) -> None:
    """Measure how far generated videos stray from the drawn ways of MC-Bench."""
    from motionrag.encoder import MotionEncoder
    from motionrag.evaluation.mc_bench import PUBLISHED_PANELS, ImageFeatures, evaluate_mc_bench
    from motionrag.tracking import load_tracker

    _hide_loading_bars()
    features = None
    if image_encoder is not None:
        features = ImageFeatures.of_encoder(MotionEncoder.from_pretrained(image_encoder, device=device))
    report = evaluate_mc_bench(
        root,
        videos,
        out=out,
        tracker=load_tracker(tracker, weights=tracker_weights, device=device),
        features=features,
        frames=frames,
        panels=PUBLISHED_PANELS if panels else 1,
    )
    if as_json:
        _print_json(report.summary)
        return
    print(report.table)
    print(f"Per-item figures, summary and table: {report.folder}")


def main() -> None:
    """Run the command line; errors are one sentence, unless `--debug` is among the arguments."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    _keep_libraries_quiet()
    try:
        app([argument for argument in arguments if argument != "--debug"])
    except SystemExit as ended:
        if ended.code == 130:  # what Typer makes of Ctrl-C, without a word
            print("Interrupted. What was committed is stored; the same command continues.", file=sys.stderr)
        raise
    except (ValueError, KeyError, OSError, RuntimeError, ImportError) as error:
        if debug:
            raise
        print(f"Error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def _keep_libraries_quiet() -> None:
    """No notices about parts being loaded; what motionrag has to say still comes through."""
    import logging
    import os

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")


def _hide_loading_bars() -> None:
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


@contextmanager
def _needs_lightning() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in ("pytorch_lightning", "jsonargparse"):
            raise
        raise ImportError("Training needs Lightning: pip install 'motionrag[train]'") from error


def _demo_control(
    image: Path | None,
    tracks: Path | None,
    bundle: str | None,
    out: Path,
    steps: int | None,
    seed: int,
    as_json: bool,
) -> None:
    from motionrag.pocket.demo_control import BUNDLE, run_control_demo

    _hide_loading_bars()
    done = run_control_demo(
        image=image, tracks=tracks, bundle=bundle or BUNDLE, out=out, num_inference_steps=steps, seed=seed
    )
    if as_json:
        print(done.report.read_text(encoding="utf-8"), end="")
        return
    print(done.table)
    _print_outcome(done)


def _print_outcome(done: "DemoResult | ControlDemoResult") -> None:
    """What took how long, and where everything is."""
    laps = ", ".join(f"{name} {seconds:g} s" for name, seconds in done.seconds.items())
    print(f"Time: {laps}.")
    print(f"Videos: {' '.join(map(str, done.videos))}\nSheet:  {done.sheet}\nReport: {done.report}")
    if done.note:
        print(f"Note: {done.note}")


def _errors_in_words(errors: dict[str, float]) -> str:
    shares = ", ".join(f"{name} {error:.1f} %" for name, error in errors.items())
    return f"; track error against the truth, of the frame: {shares}" if shares else ""


def _canvas(size: str | None) -> tuple[int, int] | tuple[None, None]:
    """480x720 as height and width."""
    if size is None:
        return None, None
    sides = size.lower().split("x")
    if len(sides) != 2 or not all(side.isdecimal() for side in sides):
        raise typer.BadParameter(f"--canvas is HEIGHTxWIDTH, such as 480x720; got {size!r}")
    return int(sides[0]), int(sides[1])


def _weights(pairs: list[str] | None) -> dict[str, float] | None:
    if not pairs:
        return None
    weights = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        try:
            weights[key] = float(value)
        except ValueError:
            raise typer.BadParameter(f"--weight takes KEY=NUMBER, got {pair!r}") from None
    return weights


def _describe(target: str | None) -> dict[str, Any]:
    if target is None:
        return _installation()
    if (Path(target) / "manifest.json").exists():
        from motionrag.database import MotionDatabase

        return MotionDatabase(target).info()
    from motionrag.bundle import MotionBundle

    return MotionBundle.from_pretrained(target).info()


def _installation() -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    import torch

    versions: dict[str, Any] = {"python": sys.version.split()[0]}
    for name in ("motionrag", "torch", "diffusers", "transformers", "open_clip_torch", "pylance", "av", "decord"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    for name in ("faiss-cpu", "faiss-gpu"):
        try:
            versions["faiss"] = f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    versions["accelerator"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return versions


def _print_json(content: Any) -> None:
    print(json.dumps(content, indent=2, ensure_ascii=False))


def _print_references(references: "list[Reference]") -> None:
    """A table on a terminal, tab-separated lines elsewhere."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table("rank", "score", "clip", "caption")
        for each in references:
            table.add_row(str(each.rank), f"{each.score:.3f}", Path(each.clip.uri).name, each.clip.caption)
        Console().print(table)
        return
    for each in references:
        print(f"{each.rank}\t{each.score:.3f}\t{each.clip.uri}\t{each.clip.caption}")


if __name__ == "__main__":
    main()
