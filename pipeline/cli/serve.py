"""The command `serve`. A command has as many parameters as options."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pipeline.cli.options import UsageError


def serve_command(
    *,
    bundle: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    public_host: str | None = None,
    slots: int | Literal["auto"] = "auto",
    max_waiting: int = 256,
    max_images: int = 16,
    max_prompt: int = 1000,
    max_body_mb: float = 8.0,
    timeout: float = 300.0,
    grace: float = 30.0,
    token_file: Path | None = None,
    refuse_urls: bool = False,
    log_prompts: bool = False,
    compile: bool = False,
) -> None:
    """Serves a bundle: a web page, and an HTTP API in the shape of OpenAI's.

    Args:
        bundle: folder that `minidalle run` made (runs/NAME/bundle), or user/name of the Hub (icons,
            which comes with the package)
        host: address to listen at; others than loopback can be reached from other machines
        port: number of the port
        public_host: name by which clients ask a proxy in front of a server at the loopback, such as
            draw.example.org
        slots: images that are sampled at a time with guidance, from 1 to 64, and fewer where the
            memory holds fewer; twice as many without; auto is 32
        max_waiting: images that wait for a slot at most; further requests get 429
        max_images: images per request at most
        max_prompt: characters of a prompt at most
        max_body_mb: MB of a request's body at most
        timeout: seconds that a request may take
        grace: seconds that running requests have after a signal to stop
        token_file: file with one token per line, of which clients show one
        refuse_urls: refuse response_format=url; give it to each of several servers behind one
            address, which do not have one another's images
        log_prompts: write prompts into the log
        compile: compile the steps of one image, so that one alone takes less than half of the time;
            the server starts that much later, a minute or two
    """
    try:
        import python_multipart  # noqa: F401  (FastAPI would miss it later, without its name)

        from pipeline.serving.server import serve
        from pipeline.serving.settings import ServerSettings
    except ModuleNotFoundError as error:
        raise UsageError(
            f"a server needs the package {error.name}; install it: pip install 'mini-dalle[serve]'"
        ) from error
    from pipeline.config.shipped_bundles import shipped_bundle

    settings = ServerSettings(
        host=host,
        port=port,
        public_host=public_host,
        slots=ServerSettings.slots if slots == "auto" else slots,
        max_waiting=max_waiting,
        max_images=max_images,
        max_prompt=max_prompt,
        max_body_mb=max_body_mb,
        timeout=timeout,
        grace=grace,
        refuse_urls=refuse_urls,
        log_prompts=log_prompts,
        compiled=compile,
    )
    serve(bundle or shipped_bundle(), settings, token_file=token_file)
