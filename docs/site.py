"""Puts the pages of experiments/results/ and their pictures into the site, so that they are kept in one place."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

_KINDS = (".md", ".png")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Called by mkdocs once it has listed docs/."""
    results = Path(config.config_file_path).parent / "experiments" / "results"
    for path in sorted(results.iterdir()):
        if path.suffix in _KINDS:
            files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files
