"""Two small tasks for lm-eval, with their texts, that need no network: one scores choices, one generates.

python integration-tests/support/lm_eval_tasks.py FOLDER
"""

import json
import sys
from pathlib import Path

TEXTS = [
    ("In the beginning God created the heaven and the", [" earth", " banana"], 0),
    ("To install the package, run pip", [" install", " Moses"], 0),
    ("The function returns a list of", [" items", " heaven"], 0),
    ("And the LORD said unto", [" Moses", " pip"], 0),
]
COMMON = """dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
doc_to_text: "{{{{text}}}}"
"""
CHOICE = """task: tiny_choice
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list:
  - metric: acc
"""
ANSWER = """task: tiny_answer
output_type: generate_until
doc_to_target: "{{choices[answer]}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 8
  do_sample: false
metric_list:
  - metric: exact_match
"""


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "texts.jsonl"
    lines = [json.dumps({"text": text, "choices": choices, "answer": answer}) for text, choices, answer in TEXTS]
    data.write_text("\n".join(lines) + "\n")
    for name, task in (("tiny_choice", CHOICE), ("tiny_answer", ANSWER)):
        (folder / f"{name}.yaml").write_text(task + COMMON.format(data=data.resolve()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
