"""Command line: serve, plan, download-weights. Nothing heavy is imported before it is needed."""

import json
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from .errors import ShardError

app = typer.Typer(
    help="Tensor-parallel shard of a text generation server. `text-generation-launcher` starts it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

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
Level = Annotated[str, typer.Option(envvar="LOGGER_LEVEL", help="TRACE, DEBUG, INFO, WARNING or ERROR.")]
TrustRemoteCode = Annotated[
    bool, typer.Option(envvar="TRUST_REMOTE_CODE", help="Accepted; no model that is served needs remote code.")
]
JsonOutput = Annotated[bool, typer.Option(envvar="JSON_OUTPUT", help="Log JSON lines.")]


def refuse(error: Exception) -> NoReturn:
    """One line for whoever started this, and exit code 1."""
    typer.echo(f"error: {error}", err=True)
    raise typer.Exit(1)


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
    device: Annotated[str, typer.Option(envvar="DEVICE", help="cpu; cuda is not served yet.")] = "cpu",
    instruction_set: Annotated[
        str | None,
        typer.Option(
            envvar="INSTRUCTION_SET",
            help="Of our own kernels on processors: avx2, avx512, or none for torch's operators alone; by default the "
            "best that the processor executes.",
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
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
    from .config import ServeConfig, prepare_environment
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
            exit_with_stdin=exit_with_stdin,
            logits_digest_dir=logits_digest_dir,
            fault_file=fault_file,
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


def local_folder(model_id: str, revision: str | None, download: bool = False) -> Path:
    """The folder of a model: itself, or that of the hub's cache."""
    from .checkpoint.locate import locate

    return locate(model_id, revision, download=download)


def main() -> None:
    """Entry point of `text-generation-server`."""
    app(prog_name="text-generation-server", args=sys.argv[1:])


if __name__ == "__main__":
    main()
