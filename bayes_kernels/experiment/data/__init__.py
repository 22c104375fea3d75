"""Data sets: tasks from files, from the hub, from docstrings of the standard library.

``stdlib_docs()``
    Docstrings of the running interpreter's own standard library, sorted into eight areas. Needs no
    download, so that a complete Bayesian fine-tuning run works on any machine that has Python.
``load_files(path)``
    Files (JSON lines, CSV, TSV) and data sets of the library ``datasets`` with ``text`` and
    ``label``, optional ``id``, ``context`` and ``choices`` (multiple choice only).
``load_hub(name)``
    The public data sets of the LoRA-uncertainty papers, through the ``datasets`` library.

``load_task(name_or_path)`` takes any of them.
"""
