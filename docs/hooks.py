"""What mkdocs does besides (`hooks` of mkdocs.yml): notebooks become pages, and configurations are
files of the site, so that links to them work there as they do in the repository."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]


def on_files(files: Files, config: Any) -> Files:
    """Add what is not a page of docs/ by itself."""
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        name = Path(notebook.src_uri).stem
        exporter = MarkdownExporter()
        body, resources = exporter.from_filename(
            notebook.abs_src_path, {"unique_key": name, "output_files_dir": name}
        )
        made = {f"{name}.md": body} | resources["outputs"]
        for path, content in made.items():
            uri = f"{Path(notebook.src_uri).parent.as_posix()}/{path}"
            files.append(File.generated(config, uri, content=content))
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        uri = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links as the repository needs them become links of the site."""
    return markdown.replace("](../configs/", "](configs/").replace(".ipynb)", ".md)")
