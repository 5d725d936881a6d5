"""Pages of their own for tables: HTML that shows without a network."""

STYLE = (
    "body{font:14px sans-serif;margin:1.5em;color:#222}table{border-collapse:collapse}"
    "th,td{padding:.25em .7em;text-align:right;border-bottom:1px solid #ddd;white-space:nowrap}"
    "th:first-child,td:first-child,th:nth-child(2),td:nth-child(2){text-align:left}"
    "th{position:sticky;top:0;background:#f3f3f3}h2{font-size:16px}p{max-width:60em}"
)


def page(title: str, *parts: str) -> str:
    """Return an HTML page of parts that are HTML themselves, one after another."""
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{title}</title>"
        f"<style>{STYLE}</style>{''.join(parts)}</html>\n"
    )
