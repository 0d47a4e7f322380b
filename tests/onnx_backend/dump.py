"""Writes the official ONNX backend node tests as files, for the conformance test.

Newer `onnx` wheels keep the node tests as Python code. This runs that code and writes each case in the
classic layout: CASE/model.onnx, CASE/test_data_set_0/{input,output}_N.pb, and CASE/tolerance.txt (rtol, atol).

    python tests/onnx_backend/dump.py OUTPUT_FOLDER
"""

import importlib.metadata
import pathlib
import sys
import warnings


def to_proto(value, type_proto):
    """One test value as the message that its declared type asks for, or None for an absent optional."""
    import numpy as np
    import onnx
    from onnx import numpy_helper

    if isinstance(value, (onnx.TensorProto, onnx.SequenceProto, onnx.OptionalProto)):
        return value
    kind = type_proto.WhichOneof("value")
    if kind == "sequence_type":
        return numpy_helper.from_list(value)
    if kind == "optional_type":
        return numpy_helper.from_optional(value)
    return numpy_helper.from_array(np.asarray(value))


def main():
    out = pathlib.Path(sys.argv[1])
    stamp = out / "version.txt"
    version = importlib.metadata.version("onnx")
    if stamp.exists() and stamp.read_text() == version:
        return
    # The packages take seconds to import: not before it is known that they are needed.
    import numpy as np
    from onnx.backend.test.case import node

    warnings.simplefilter("ignore")
    np.seterr(all="ignore")
    skipped = 0
    cases = node.collect_testcases(None)
    for case in cases:
        folder = out / case.name
        data = folder / "test_data_set_0"
        data.mkdir(parents=True, exist_ok=True)
        (folder / "model.onnx").write_bytes(case.model.SerializeToString())
        (folder / "tolerance.txt").write_text(f"{case.rtol} {case.atol}\n")
        inputs, outputs = case.data_sets[0]
        for stem, values, infos in (
            ("input", inputs, case.model.graph.input),
            ("output", outputs, case.model.graph.output),
        ):
            for i, value in enumerate(values):
                try:
                    message = to_proto(value, infos[i].type).SerializeToString()
                except Exception as error:  # a value that the wheel itself cannot serialise
                    skipped += 1
                    print(f"{case.name}: {stem} {i}: {error}", file=sys.stderr)
                    continue
                (data / f"{stem}_{i}.pb").write_bytes(message)
    stamp.write_text(version)
    print(f"{len(cases)} cases written to {out}, {skipped} values skipped")


if __name__ == "__main__":
    main()
