"""Cut the GPU's code out of a shared library that runs on CPUs only.

Four fifths of CatBoost's library are CUDA kernels (ELF section `.nv_fatbin`). They are looked at
when a GPU is asked for and never else, so the file does without them. Addresses stay as they are:
the segment that holds the section becomes two with a hole between them, and what comes later moves
forward in the file. The second segment takes the place of PT_PHDR in the program headers, which
tells a program where its headers are and means nothing in a library.

Usage: python drop_gpu_code.py LIBRARY
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

SECTION = b".nv_fatbin"
_ELF64_LITTLE_ENDIAN = b"\x7fELF\x02\x01"
_LOAD, _PHDR, _NOBITS = 1, 6, 8
# Fields of the file's header (section 4 of the ELF specification), of a program and of a section.
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM = struct.Struct("<IIQQQQQQ")
_SECTION = struct.Struct("<IIQQQQIIQQ")


class NotCutError(Exception):
    """The file is not what was expected; the message says how."""


def without_gpu_code(library: bytes) -> bytes:
    """The same library with a hole where the GPU's code was.

    Raises:
        NotCutError: it is no such library.
    """
    if library[:6] != _ELF64_LITTLE_ENDIAN:
        raise NotCutError("no 64-bit little-endian ELF file")
    try:
        return _cut(library)
    except (struct.error, IndexError, ValueError) as error:
        raise NotCutError(f"a broken ELF file ({error})") from error


def _cut(library: bytes) -> bytes:
    header = list(_HEADER.unpack_from(library))
    programs_at, sections_at, program_count, section_count = (header[i] for i in (5, 6, 10, 12))
    programs = _read(_PROGRAM, library, programs_at, program_count)
    sections = _read(_SECTION, library, sections_at, section_count)
    names = sections[header[13]][4]
    named = [
        section
        for section in sections
        if library[names + section[0] : library.index(b"\0", names + section[0])] == SECTION
    ]
    if len(named) != 1 or named[0][1] == _NOBITS:
        raise NotCutError(f"no section {SECTION.decode()} to cut out")
    gpu = named[0]
    offset, size = gpu[4:6]
    around = [
        program
        for program in programs
        if program[0] == _LOAD and program[2] <= offset and offset + size <= program[2] + program[5]
    ]
    if len(around) != 1:
        raise NotCutError(f"section {SECTION.decode()} is not inside one segment")
    if not any(program[0] == _PHDR for program in programs):
        raise NotCutError("no PT_PHDR whose place a second segment could take")

    page = around[0][7]
    begin, end = -(-offset // page) * page, (offset + size) // page * page
    if end <= begin:
        raise NotCutError(f"section {SECTION.decode()} is smaller than a page")
    gone = end - begin
    made = []
    for kind, flags, at, address, physical, in_file, in_memory, align in programs:
        if kind == _PHDR:
            continue
        if [kind, at] == [_LOAD, around[0][2]]:
            before, behind = begin - at, end - at
            made.append((kind, flags, at, address, physical, before, before, align))
            at, address, physical = end, address + behind, physical + behind
            in_file, in_memory = in_file - behind, in_memory - behind
        moved = at - gone if at >= end else at
        made.append((kind, flags, moved, address, physical, in_file, in_memory, align))
    for section in sections:
        if section is gpu:
            section[1] = _NOBITS
        elif section[4] >= end:
            section[4] -= gone
    header[6] = sections_at - gone if sections_at >= end else sections_at

    cut = bytearray(library[:begin] + library[end:])
    _HEADER.pack_into(cut, 0, *header)
    _write(_PROGRAM, cut, programs_at, made)
    _write(_SECTION, cut, header[6], sections)
    return bytes(cut)


def _read(layout: struct.Struct, library: bytes, at: int, count: int) -> list[list[int]]:
    return [list(layout.unpack_from(library, at + i * layout.size)) for i in range(count)]


def _write(
    layout: struct.Struct, library: bytearray, at: int, rows: Iterable[Sequence[int]]
) -> None:
    for i, row in enumerate(rows):
        layout.pack_into(library, at + i * layout.size, *row)


def main(arguments: list[str]) -> int:
    """Cut one file in place.

    Returns:
        The exit code: 0, 1 with one message where the file is not as expected, 2 for bad usage.
    """
    if len(arguments) != 1:
        sys.stderr.write("Usage: python drop_gpu_code.py LIBRARY\n")
        return 2
    file = Path(arguments[0])
    try:
        library = file.read_bytes()
        cut = without_gpu_code(library)
    except (OSError, NotCutError) as error:
        sys.stderr.write(
            f"error: {file}: {error}. Expected CatBoost's library with its GPU code; leave this "
            "step out if CatBoost has none any more\n"
        )
        return 1
    # A new file, not the old one written over: that may be a hard link into a package cache.
    partial = file.with_name(f"{file.name}.part")
    partial.write_bytes(cut)
    partial.chmod(file.stat().st_mode)
    partial.replace(file)
    sys.stdout.write(f"{file.name}: {len(library):,} -> {len(cut):,} bytes\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
