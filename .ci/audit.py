"""Audit the locked packages and write the list of parts of a release: `make audit`.

Writes into `build/release` the report of pip-audit on constraints.txt (`audit.json`) and the
packages of .venv in CycloneDX format (`llamesh.cdx.json`). pip-audit exits with 0 although it has
looked nothing up: packages without data are reported as skipped here, never as passed.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOOLS, TARGET = ROOT / "build/audit/bin", ROOT / "build/release"
CONSTRAINTS = ROOT / "constraints.txt"


def main() -> int:
    """Run both tools; return 1 if a package has a known vulnerability or is not a locked one."""
    report = TARGET / "audit.json"
    report.unlink(missing_ok=True)
    command: list[str | Path] = [
        TOOLS / "pip-audit",
        "--requirement",
        CONSTRAINTS,
        "--no-deps",
        "--disable-pip",
    ]
    command += ["--format", "json", "--output", report, "--progress-spinner", "off"]
    done = subprocess.run(command, capture_output=True, text=True)
    dependencies = json.loads(report.read_text())["dependencies"] if report.exists() else []
    code, message = summary(dependencies, done.stderr)
    print(message)

    parts = TARGET / "llamesh.cdx.json"
    command = [TOOLS / "cyclonedx-py", "environment", "--pyproject", ROOT / "pyproject.toml"]
    command += ["--output-reproducible", "--of", "JSON", "--output-file", parts]
    subprocess.run([*command, ROOT / ".venv/bin/python"], check=True)
    components = json.loads(parts.read_text())["components"]
    others = unlocked(components, CONSTRAINTS.read_text())
    print(f"Wrote {parts.relative_to(ROOT)}: {len(components)} packages.")
    if others:
        print(f"Not at the version of constraints.txt: {', '.join(others)}; run make clean first.")
    return max(code, int(bool(others)))


def summary(dependencies: list[dict[str, Any]], output: str) -> tuple[int, str]:
    """Return exit code and message of an audit.

    Args:
        dependencies: Of pip-audit's JSON report; empty if it wrote none.
        output: What pip-audit printed.
    """
    if not dependencies:
        reason = (output.strip() or "no output").splitlines()[-1]
        return 0, f"SKIPPED: pip-audit made no report ({reason}). This is no passed audit."
    found = [
        f"{each['name']} {each['version']}: {', '.join(v['id'] for v in each['vulns'])}"
        for each in dependencies
        if each.get("vulns")
    ]
    skipped = [each["name"] for each in dependencies if "skip_reason" in each]
    lines = [f"Audited {len(dependencies) - len(skipped)} of {len(dependencies)} packages."]
    if found:
        lines.append("Known vulnerabilities:\n  " + "\n  ".join(found))
    if skipped:
        first = next(each["skip_reason"] for each in dependencies if "skip_reason" in each)
        lines.append(
            f"SKIPPED {len(skipped)} packages without data (the first: {first}). They have not "
            "passed; repeat make audit where pypi.org is reachable."
        )
    elif not found:
        lines.append("No known vulnerabilities.")
    return int(bool(found)), "\n".join(lines)


def unlocked(components: list[dict[str, Any]], constraints: str) -> list[str]:
    """Return the components of an environment that are not at their version in constraints.txt."""
    lines = [line for line in constraints.splitlines() if "==" in line]
    locked = dict(line.split("==") for line in lines)
    versions = {normalized(name): version.strip() for name, version in locked.items()}
    ours = {"llamesh", "pip", "setuptools"}
    return [
        f"{each['name']}=={each['version']}"
        for each in components
        if versions.get(normalized(each["name"])) != each["version"].partition("+")[0]
        and normalized(each["name"]) not in ours
    ]


def normalized(name: str) -> str:
    """Return a package's name as package indexes compare it."""
    return name.strip().lower().replace("_", "-").replace(".", "-")


if __name__ == "__main__":
    sys.exit(main())
