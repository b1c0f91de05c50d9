"""The page `/docs`: the API's paths and fields. It loads nothing, and from no other host."""

import html
import json
from typing import Any

HEAD = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>ldm-web</title>
<style>
  body {font-family: system-ui; max-width: 60rem; margin: 2rem auto; padding: 0 1rem}
  th, td {text-align: left; vertical-align: top; padding: 0 1rem 0 0}
</style>
<h1>ldm-web</h1>
<p>The same for programs: <a href="openapi.json">openapi.json</a></p>
"""


def page(schema: dict[str, Any]) -> str:
    """HTML of an OpenAPI schema."""
    rows = [HEAD]
    for path, methods in schema["paths"].items():
        for method, facts in methods.items():
            rows.append(f"<h2><code>{method.upper()} {html.escape(path)}</code></h2>")
            rows.append(f"<p>{html.escape(facts.get('description', ''))}</p>")
            content = facts.get("requestBody", {}).get("content", {})
            name = content.get("application/json", {}).get("schema", {}).get("$ref", "")
            known = schema.get("components", {}).get("schemas", {})
            rows += _table(known.get(name.rpartition("/")[2], {}))
    return "\n".join(rows)


def _table(model: dict[str, Any]) -> list[str]:
    """Rows of the fields of a request."""
    if "properties" not in model:
        return []
    rows = ["<table><tr><th>field<th>default<th></tr>"]
    for name, field in model["properties"].items():
        cells = (name, json.dumps(field.get("default")), field.get("description", ""))
        rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in cells))
    return [*rows, "</table>"]
