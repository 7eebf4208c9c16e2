r"""The fields of a tar header: numbers, checksums, pax records, times.

POSIX pax(1), "ustar Interchange Format" and "pax Extended Header"; GNU tar's manual,
"Basic Tar Format". ``at`` is the header's offset, for the message of BadTar.
"""

from __future__ import annotations

import zlib

from overlayctl.errors import BadTar

_INT64 = range(-(1 << 63), 1 << 63)


def shown(name: bytes) -> str:
    """A name for a message: quoted, escaped, not too long."""
    return repr(name[:200])[1:]


def check_sum(block: bytes, field: bytes, at: int) -> None:
    """Check a header block against its checksum field. Raises BadTar."""
    # adler32's low half is the plain sum of up to 256 bytes, plus one: an exact
    # sum of the 512, at the speed of C. The checksum field counts as eight spaces.
    unsigned = (zlib.adler32(block[:256]) & 0xFFFF) + (zlib.adler32(block[256:]) & 0xFFFF) - 2
    unsigned += 256 - sum(field)
    stated = number(field, at)
    if stated != unsigned:
        # Some old writers summed signed chars.
        signed = unsigned - 256 * sum(byte > 127 for byte in block[:148] + block[156:])
        if stated != signed:
            raise BadTar(
                f"not a tar header at byte {at}: it says checksum {stated}, it has {unsigned}",
                hint="the file is damaged or no tar archive",
                offset=at,
            )


def number(field: bytes, at: int) -> int:
    """An octal or base-256 header number, signed (GNU tar manual, "Basic Tar Format")."""
    if field[0] & 0x80:
        bits = 8 * len(field) - 1
        value = int.from_bytes(field, "big") & ((1 << bits) - 1)
        if field[0] & 0x40:
            value -= 1 << bits
        if value not in _INT64:
            raise BadTar(f"a number of more than 64 bits in the header at byte {at}", offset=at)
        return value
    digits = field.strip(b" \0").split(b"\0", 1)[0]
    if not digits:
        return 0
    try:
        if digits.isdigit():
            return int(digits, 8)
    except ValueError:
        pass
    raise BadTar(f"not an octal number in the header at byte {at}: {digits!r}", offset=at)


def decimal(text: bytes, at: int) -> int:
    """A signed 64-bit decimal number of a pax header or sparse map. Raises BadTar."""
    digits = text[1:] if text[:1] in (b"-", b"+") else text
    if not digits.isdigit() or len(digits) > 19:
        raise BadTar(f"not a number in the extended header at byte {at}: {text[:40]!r}", offset=at)
    value = int(text)
    if value not in _INT64:
        raise BadTar(f"a number of more than 64 bits at byte {at}: {text!r}", offset=at)
    return value


def pax_records(body: bytes, at: int) -> dict[str, bytes]:
    r"""The records ``length key=value\n`` of a pax header; sparse 0.0 pairs become one map."""
    records: dict[str, bytes] = {}
    pairs: list[bytes] = []
    where = 0
    while where < len(body):
        space = body.find(b" ", where, where + 21)
        length = body[where:space] if space > 0 else b""
        if not length.isdigit():
            raise BadTar(f"a broken pax record at byte {at}", offset=at)
        end = where + int(length)
        raw_key, equals, value = body[space + 1 : end - 1].partition(b"=")
        if end > len(body) or end <= space + 1 or body[end - 1 : end] != b"\n":
            raise BadTar(f"a broken pax record at byte {at}", offset=at)
        key = raw_key.decode("utf-8", "surrogateescape")
        text_only = key in ("path", "linkpath", "uname", "gname")
        if not raw_key or not equals or b"\0" in (value if text_only else raw_key):
            raise BadTar(f"a broken pax record at byte {at}: {raw_key[:40]!r}", offset=at)
        if key in ("GNU.sparse.offset", "GNU.sparse.numbytes"):
            if (len(pairs) % 2 == 0) != (key == "GNU.sparse.offset") or b"," in value:
                raise BadTar(f"a broken sparse map in the pax header at byte {at}", offset=at)
            pairs.append(value)
        else:
            records[key] = value
        where = end
    if pairs:
        records["GNU.sparse.map"] = b",".join(pairs)
    return records


def time(text: bytes, at: int) -> tuple[int, int]:
    """Seconds (rounded down) and nanoseconds of a decimal pax time; finer digits are cut."""
    whole, _, fraction = text.partition(b".")
    seconds = decimal(whole, at)
    if not fraction:
        return seconds, 0
    if not fraction.isdigit():
        raise BadTar(f"not a time in the pax header at byte {at}: {text[:40]!r}", offset=at)
    nanoseconds = int(fraction[:9].ljust(9, b"0"))
    if whole.startswith(b"-") and nanoseconds:
        return seconds - 1, 1_000_000_000 - nanoseconds
    return seconds, nanoseconds
