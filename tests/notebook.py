"""Execute a notebook's code cells in one namespace, without Jupyter: python tests/notebook.py FILE '{"SEEDS": [0]}'.

The names in the JSON are set after the cell that is tagged "parameters". Prints, as JSON, a list with what each code
cell printed and the type of its last expression ("" where that is none).
"""

import ast
import contextlib
import io
import json
import sys


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def execute(notebook: dict, parameters: dict) -> list[tuple[str, str]]:
    space: dict = {"__name__": "__main__"}
    sys.modules["__main__"].__dict__.update(space)
    done = []
    for number, cell in enumerate(code_cells(notebook)):
        tree = ast.parse("".join(cell["source"]), f"cell {number}")
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(tree, f"<cell {number}>", "exec"), space)
            value = eval(compile(ast.Expression(last.value), f"<cell {number}>", "eval"), space) if last else None
        done.append((printed.getvalue(), "" if value is None else type(value).__name__))
        if "parameters" in cell["metadata"].get("tags", ()):
            space.update(parameters)
    return done


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        content = json.load(file)
    print(json.dumps(execute(content, json.loads(sys.argv[2]))))
