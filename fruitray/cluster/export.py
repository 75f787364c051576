"""export: a model package for other runtimes. Needs no cluster; it stands here so that every job is in one place."""

from fruitray.cluster.runtime import open_input, open_output
from fruitray.config import ExportConfig
from fruitray.console import say
from fruitray.export import export, require_free, require_runtime
from fruitray.package import load_package


def run(config: ExportConfig) -> str:
    """Export, check on photos, write; an error says by how much the answers differ."""
    require_runtime(config.format)
    images = open_input(config.images) if config.images else None
    out = open_output(config.out, images)
    package = load_package(config.package)
    require_free(out, package.model_id, config.format)
    written = export(package, config.format, images, out)
    parity = written["parity"]
    say(
        f"export: on {parity['photos']} photos the shares of the classes differ by {parity['greatest_difference']:.1e} "
        f"at most from the package's in float32 ({parity['tolerance']:.0e} is allowed), and by "
        f"{parity['greatest_difference_from_score']:.1e} from what score says on this machine"
    )
    return f"export: model {package.model_id[:12]} as {out.uri_of(written['file'])}, described in export.json"
