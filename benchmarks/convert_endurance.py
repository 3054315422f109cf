"""The converter's long tests, recorded: 50 kills at random moments, 10,000 mutated sources.

Each kill is followed by the conversion that takes the work up again, and by a comparison of what
came out; of the mutated sources each must convert correctly or be refused in one sentence, within
five seconds and the bound of the memory.

    python benchmarks/convert_endurance.py --json benchmarks/results/convert_endurance.json
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from measured import provenance_of
from timing import write_entry

TESTS = Path(__file__).parents[1] / "tests"
FILES = ("convert/test_resume.py", "convert/formats/test_hostile.py")


def main() -> int:
    """Run the tests and write what they took; 1 if one failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, help="file to put the figures into")
    args = parser.parse_args()
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "long", "-n", "0", f"--junitxml={report}"]
        subprocess.run([*command, *(str(TESTS / file) for file in FILES)], check=False)
        cases = list(ElementTree.parse(report).iter("testcase"))
    for case in cases:
        passed = not list(case)  # nothing is said of a test that passed
        name = case.attrib["name"]
        row = {"measured": provenance_of("benchmarks/convert_endurance.py"), "passed": passed}
        write_entry(args.json, "tests", name, row | {"s": round(float(case.attrib["time"]), 1)})
        print(f"{name}: {'passed' if passed else 'failed'} in {case.attrib['time']} s")
        if not passed:
            failed.append(name)
    return int(bool(failed) or not cases)


if __name__ == "__main__":
    sys.exit(main())
