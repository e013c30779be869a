"""Command line: serve, plan, devices, quantize, download-weights, compile-kernels.

Nothing heavy is imported before it is needed.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from .errors import ShardError
from .version import version

app = typer.Typer(
    help="Tensor-parallel shard of a text generation server. `text-generation-launcher` starts it.",
    no_args_is_help=True,
    # Frames and columns leave no room for names of options where a terminal has 80 columns.
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def print_version(wanted: bool) -> None:
    """Number and commit of this build, and nothing else."""
    if wanted:
        typer.echo(f"text-generation-server {version()}")
        raise typer.Exit


@app.callback()
def common(
    _: Annotated[
        bool, typer.Option("--version", "-V", help="Print the version.", callback=print_version, is_eager=True)
    ] = False,
) -> None:
    """Options before any command."""


Model = Annotated[str, typer.Argument(envvar="MODEL_ID", help="Folder of the model, or its id on the hub.")]
Revision = Annotated[str | None, typer.Option(envvar="REVISION", help="Branch, tag or commit on the hub.")]
Quantize = Annotated[
    str | None,
    typer.Option(
        envvar="QUANTIZE",
        help="Method that the weights must be quantized with (found in the checkpoint if absent): gptq, awq, "
        "compressed-tensors, fp8, bitsandbytes, bitsandbytes-nf4 or bitsandbytes-fp4. The last four also quantize "
        "plain weights while they are loaded.",
    ),
]
GptqBits = Annotated[
    int | None, typer.Option(envvar="GPTQ_BITS", help="Bits of gptq tensors of which no file says it.")
]
GptqGroupsize = Annotated[
    int | None,
    typer.Option(envvar="GPTQ_GROUPSIZE", help="Group size of gptq tensors of which no file says it; -1: one group."),
]
Dtype = Annotated[
    str | None,
    typer.Option(envvar="DTYPE", help="float32, bfloat16 or float16; by default what the device computes natively."),
]
Device = Annotated[
    str,
    typer.Option(envvar="DEVICE", help="cpu, or cuda for NVIDIA GPUs: rank i has the i-th that this process may see."),
]
Level = Annotated[str, typer.Option(envvar="LOGGER_LEVEL", help="TRACE, DEBUG, INFO, WARNING or ERROR.")]
TrustRemoteCode = Annotated[
    bool, typer.Option(envvar="TRUST_REMOTE_CODE", help="Accepted; no model that is served needs remote code.")
]
JsonOutput = Annotated[bool, typer.Option(envvar="JSON_OUTPUT", help="Log JSON lines.")]
KernelCache = Annotated[
    Path | None,
    typer.Option(
        envvar="KERNEL_CACHE",
        help="Folder of kernels for GPUs that were compiled: they are read there, and put there if it can be written. "
        "By default ~/.cache/text-generation-server/cubins.",
    ),
]


def refuse(error: Exception | str, code: int = 1) -> NoReturn:
    """One line for whoever started this, and an exit code."""
    typer.echo(f"error: {error}", err=True)
    raise typer.Exit(code)


@app.command()
def serve(
    model_id: Model,
    uds_path: Annotated[Path, typer.Option(envvar="UDS_PATH", help="Unix socket to answer on.")],
    rank: Annotated[int, typer.Option(envvar="RANK", help="This process's tensor-parallel rank.")] = 0,
    world_size: Annotated[int, typer.Option(envvar="WORLD_SIZE", help="Number of ranks.")] = 1,
    num_threads: Annotated[int, typer.Option(envvar="NUM_THREADS", help="Threads to compute with.")] = 1,
    memory_bytes: Annotated[
        int, typer.Option(envvar="MEMORY_BYTES", help="Memory for weights, activations and KV cache of this rank.")
    ] = 4 << 30,
    revision: Revision = None,
    quantize: Quantize = None,
    gptq_bits: GptqBits = None,
    gptq_groupsize: GptqGroupsize = None,
    dtype: Dtype = None,
    device: Device = "cpu",
    instruction_set: Annotated[
        str | None,
        typer.Option(
            envvar="INSTRUCTION_SET",
            help="Our own kernels on processors: avx2, avx512, avx512_vnni, avx512_bf16, amx, or none for torch's "
            "operators alone; by default the best that the processor executes, but for amx.",
        ),
    ] = None,
    kernel_cache: KernelCache = None,
    trust_remote_code: TrustRemoteCode = False,
    watermark_gamma: Annotated[
        float, typer.Option(envvar="WATERMARK_GAMMA", help="The share of the vocabulary that the watermark favours.")
    ] = 0.5,
    watermark_delta: Annotated[
        float, typer.Option(envvar="WATERMARK_DELTA", help="What the watermark adds to the logits of that share.")
    ] = 2.0,
    cuda_graphs: Annotated[
        str | None,
        typer.Option(
            envvar="CUDA_GRAPHS",
            help="On GPUs: numbers of decoding sequences whose steps are recorded as CUDA graphs, with commas between; "
            "0: none. By default 1, 2, 4 and more, up to 128.",
        ),
    ] = None,
    logger_level: Level = "INFO",
    json_output: JsonOutput = False,
    exit_with_stdin: Annotated[
        bool, typer.Option("--exit-with-stdin", help="End when standard input does: it is the launcher's lifeline.")
    ] = False,
    logits_digest_dir: Annotated[
        Path | None,
        typer.Option(
            envvar="LOGITS_DIGEST_DIR", help="Debugging: rank 0 writes a digest of every sampled row's logits here."
        ),
    ] = None,
    fault_file: Annotated[
        Path | None, typer.Option(envvar="FAULT_FILE", help="Debugging: faults on demand, see faults.py.")
    ] = None,
) -> None:
    """Serve one rank of a model on a Unix socket."""
    from .config import ServeConfig, prepare_environment, read_sizes
    from .logs import set_up
    from .service import run

    prepare_environment()
    try:
        set_up(logger_level, json_output, rank)
        config = ServeConfig(
            model_dir=local_folder(model_id, revision),
            rank=rank,
            world_size=world_size,
            uds_path=uds_path,
            num_threads=num_threads,
            memory_bytes=memory_bytes,
            dtype=dtype,
            quantize=quantize,
            gptq_bits=gptq_bits,
            gptq_groupsize=gptq_groupsize,
            device=device,
            instruction_set=instruction_set,
            kernel_cache=kernel_cache,
            exit_with_stdin=exit_with_stdin,
            logits_digest_dir=logits_digest_dir,
            fault_file=fault_file,
            watermark_gamma=watermark_gamma,
            watermark_delta=watermark_delta,
            recorded_sizes=read_sizes(cuda_graphs),
        )
        run(config)
    except ShardError as error:
        refuse(error)


@app.command()
def plan(
    model_id: Model,
    num_shard: Annotated[int, typer.Option(envvar="NUM_SHARD", help="Number of ranks.")] = 1,
    revision: Revision = None,
    quantize: Quantize = None,
    gptq_bits: GptqBits = None,
    gptq_groupsize: GptqGroupsize = None,
    dtype: Dtype = None,
    device: Device = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell what would be loaded, from the configuration and the headers of the weights alone."""
    from .planning import plan_model

    try:
        folder = local_folder(model_id, revision)
        planned = plan_model(
            folder,
            world_size=num_shard,
            dtype=dtype,
            quantize=quantize,
            gptq_bits=gptq_bits,
            gptq_groupsize=gptq_groupsize,
            device=device,
        )
        planned.check_tokenizer()
    except ShardError as error:
        refuse(error)
    facts = planned.summary()
    if as_json:
        typer.echo(json.dumps(facts))
    else:
        for key, value in facts.items():
            typer.echo(f"{key:<28} {value}")


@app.command()
def devices(
    num_shard: Annotated[
        int | None, typer.Option(envvar="NUM_SHARD", help="How many GPUs are wanted; all that are visible if absent.")
    ] = None,
) -> None:
    """Tell which GPUs there are for ranks, as JSON, or why none can be used. Asks the driver alone."""
    from dataclasses import asdict

    from .kernels.cuda.libcuda import check_torch, visible_gpus

    try:
        gpus = visible_gpus(num_shard)
        check_torch()
    except ShardError as error:
        refuse(f"--device cuda: {error}")
    typer.echo(json.dumps([asdict(gpu) for gpu in gpus]))


@app.command()
def compile_kernels(
    architectures: Annotated[
        str, typer.Option(help="Of GPUs, with commas between; sm_90 is Hopper. By default all that are served.")
    ] = "",
    kernel_cache: KernelCache = None,
) -> None:
    """Compile the CUDA kernels ahead of time and tell what each takes. Needs neither a GPU nor a driver."""
    from .kernels.cuda.ahead import compile_ahead
    from .kernels.cuda.compile import ARCHITECTURES

    try:
        for line in compile_ahead([name for name in architectures.split(",") if name] or ARCHITECTURES, kernel_cache):
            typer.echo(line)
    except ShardError as error:
        refuse(error)


@app.command(
    epilog="Ends with 0; with 1 if something is wrong, or --max-ppl-increase was exceeded; with 2 for a wrong option; "
    "with 130 after Ctrl-C."
)
def quantize(
    model_id: Model,
    output_dir: Annotated[Path, typer.Argument(help="Folder for the result: an empty one, or one that is not there.")],
    method: Annotated[
        str,
        typer.Option(
            help="gptq (best at few bits), awq (4 bits, scales of channels), rtn (round to nearest, at once), or what "
            "bitsandbytes makes: bitsandbytes (8 bits), bitsandbytes-nf4, bitsandbytes-fp4."
        ),
    ] = "gptq",
    bits: Annotated[int | None, typer.Option(help="2, 3, 4 or 8, of gptq and rtn; 4 if absent.")] = None,
    groupsize: Annotated[
        int | None,
        typer.Option(
            help="gptq, awq, rtn: inputs that share a scale: 16, 32, ... 1024, -1 for one group; 128 if absent."
        ),
    ] = None,
    sym: Annotated[
        bool | None,
        typer.Option(
            "--sym/--no-sym", help="gptq, awq, rtn: zero in the middle, or stored zero points (awq's if absent)."
        ),
    ] = None,
    percdamp: Annotated[
        float | None,
        typer.Option(help="gptq: what is added to the Hessian's diagonal, as a share of its mean; 0.01 if absent."),
    ] = None,
    act_order: Annotated[
        bool | None,
        typer.Option(
            "--act-order/--no-act-order", help="gptq: round the columns that matter most first; yes if absent."
        ),
    ] = None,
    static_groups: Annotated[
        bool | None,
        typer.Option(
            "--static-groups/--no-static-groups",
            help="gptq: groups of neighbours, so that act-order costs nothing when serving (yes if absent); else "
            "groups of columns that are rounded one after another, which act-order shuffles (desc_act).",
        ),
    ] = None,
    mse: Annotated[
        bool | None,
        typer.Option(
            "--mse/--no-mse",
            help="gptq, rtn: search the best range of each group instead of taking its largest weight; yes if absent.",
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            help="Layers left as they are: a name or its end, with * and ?: 'down_proj', 'layers.0.*'. May be given "
            "several times. The output head always is."
        ),
    ] = None,
    module_bits: Annotated[
        list[str] | None, typer.Option(help="gptq, rtn: other bits for some layers, 'down_proj=8'. Several times.")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Calibration text: a .txt (a line %%%% between two texts), .jsonl or .parquet file with texts "
            "('text') or chats ('messages', 'conversations'), or wikitext2, c4, ptb from the hub. If absent: text "
            "that is bundled, no network needed."
        ),
    ] = None,
    num_samples: Annotated[
        int | None, typer.Option(help="Sequences to measure with; up to 128 of what the text has if absent.")
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens of each; 2048, or what the model takes, if absent.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draw of sequences. The same command makes the same bytes.")] = 0,
    device: Annotated[str, typer.Option(envvar="DEVICE", help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[
        str | None,
        typer.Option(help="What is computed in: float32 or bfloat16; by default what the device computes natively."),
    ] = None,
    num_threads: Annotated[int | None, typer.Option(help="Threads of the CPU; all usable cores if absent.")] = None,
    max_memory: Annotated[
        str | None, typer.Option(help="Host memory that may be used, '24GiB'; what is free if absent.")
    ] = None,
    max_device_memory: Annotated[
        str | None, typer.Option(help="Memory of the GPU that may be used; what is free if absent.")
    ] = None,
    max_ppl_increase: Annotated[
        float | None, typer.Option(help="Exit with 1 if the perplexity on held-back text grows by more than this.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin anew, and replace a result in OUTPUT_DIR.")
    ] = False,
    upload_to_model_id: Annotated[
        str | None, typer.Option(help="Push the finished result to this repository of the hub.")
    ] = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    logger_level: Level = "INFO",
    json_output: JsonOutput = False,
) -> None:
    """Quantize a model: block by block, so that it fits into memory; kill it and give the same command to go on.

    Makes a folder that the launcher serves as it is. At first it says how much memory, disk and time it will take. At
    the end the result is read back and compared with the model on text that was held back (an eighth of what is
    measured): perplexity of both, and divergence. A line of JSON on standard output has these figures; README.md,
    quantization_report.jsonl and quantization_error.png of the folder have them too, with the error of each layer.

    Four bits, no network needed: text-generation-server quantize path/of/model path/of/result

    Still smaller: add --bits 3 --groupsize 64 --module-bits down_proj=4

    With text like that which it will see: add --dataset chats.jsonl (a line: {"text": "..."} or {"messages": [...]})

    To be sure of it: add --max-ppl-increase 0.5
    """
    from .config import prepare_environment
    from .logs import set_up
    from .quantize.checks import quantize as carry_out
    from .quantize.settings import (
        Options,
        Resources,
        Sampling,
        choose_scheme,
        choose_solver,
        read_module_bits,
        read_size,
    )

    prepare_environment(serves=False)
    on_stop(_leave)
    try:
        set_up(logger_level, json_output, None)
        chosen = read_module_bits(module_bits or [])
        options = Options(
            model_dir=local_folder(model_id, revision, download=True, name="MODEL_ID"),
            output_dir=output_dir,
            model_name=model_id,
            scheme=choose_scheme(method, bits, groupsize, sym, exclude or [], chosen),
            solver=choose_solver(method, percdamp, act_order, static_groups, mse),
            sampling=Sampling(dataset, num_samples, sequence_length, seed),
            resources=Resources(
                device,
                dtype,
                num_threads,
                read_size("--max-memory", max_memory),
                read_size("--max-device-memory", max_device_memory),
            ),
            max_ppl_increase=max_ppl_increase,
            overwrite=overwrite,
            upload_to=upload_to_model_id,
        )
        outcome = carry_out(options, begins=lambda: on_stop(signal.default_int_handler))
        on_stop(signal.SIG_IGN)  # all is done
    except ShardError as error:
        refuse(error, error.exit_code)
    except KeyboardInterrupt:
        refuse(STOPPED, 130)
    typer.echo(json.dumps({"model_dir": str(outcome.folder), "proof": outcome.proof}))
    if outcome.too_bad:
        raise typer.Exit(1)


@app.command()
def download_weights(
    model_id: Model,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    logger_level: Level = "INFO",
    json_output: JsonOutput = False,
) -> None:
    """Bring a model from the hub into the local cache. The last line printed is JSON that names its folder."""
    from .logs import set_up

    try:
        set_up(logger_level, json_output, None)
        folder = local_folder(model_id, revision, download=True)
    except ShardError as error:
        refuse(error)
    typer.echo(json.dumps({"model_dir": str(folder)}))


STOPPED = "stopped; nothing was changed; give the same command again to begin, or to go on"


def on_stop(handler: Any) -> None:
    """What Ctrl-C does, and a polite end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def _leave(number: int, frame: object) -> None:
    """While modules are loaded: some swallow an exception, and one that is half loaded fails later."""
    os.write(sys.stderr.fileno(), f"error: {STOPPED}\n".encode())
    os._exit(130)


def local_folder(model_id: str, revision: str | None, download: bool = False, name: str = "--model-id") -> Path:
    """The folder of a model: itself, or that of the hub's cache."""
    from .checkpoint.locate import locate

    return locate(model_id, revision, download=download, name=name)


def main() -> None:
    """Entry point of `text-generation-server`."""
    app(prog_name="text-generation-server", args=sys.argv[1:])


if __name__ == "__main__":
    main()
