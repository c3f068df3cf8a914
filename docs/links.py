# SPDX-License-Identifier: Apache-2.0
"""Links of the pages to files of the repository that are no pages: pictures come along, other links become text."""

import re
from pathlib import Path

from mkdocs.structure.files import File


ROOT = Path(__file__).parent.parent
PICTURE = re.compile(r"!\[([^\]]*)\]\(\.\./([^)]+)\)")
LINK = re.compile(r"\[([^\]]*)\]\(\.\./[^)]+\)")


def on_files(files, config):
    for page in files.documentation_pages():
        for _, path in PICTURE.findall(page.content_string):
            if files.get_file_from_path(path) is None:
                files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, **kwargs):
    return LINK.sub(r"\1", PICTURE.sub(r"![\1](\2)", markdown))
