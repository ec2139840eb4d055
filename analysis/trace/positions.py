"""Where in its file each call began that does not say so: followed from open, seek and read to the next.

A descriptor's position moves with what is read and written through it. A trace names files, not descriptors:
a position is known while a file has one descriptor in the process; and where it has several, for what a
thread reads right after its own seek, as long as no other thread uses the file. DFTracer does not record
fprintf and fscanf: what they move is missing in the positions of streams.

The compiled loop indexes by numbers of strings, which the scanner keeps below the length of the table.
"""

import numpy as np

from analysis.trace.classify import find_operation
from analysis.trace.scan import INT, MAX_WHOLE, STRING, EventBlock
from analysis.trace.strings import ID, StringTable, compiled

NOT_FOLLOWED, OPEN, CLOSE, SEEK, MOVE, LOSE = range(6)  # what a call does to a position
_UNKNOWN = -1
_APPEND = 0o2000  # of open(2)'s flags
# move the position, and do not say where to
_LOSING = ("rewind", "ungetc", "fsetpos", "fprintf", "fscanf", "vfscanf")
_OPERATIONS = {"open": OPEN, "close": CLOSE, "seek": SEEK, "read": MOVE, "write": MOVE}


class FilePositions:
    """The positions in the files of one process: feed it the blocks of its trace in their order."""

    def __init__(self) -> None:
        self.position = np.empty(0, np.int64)  # by the number of the file's hash
        self.opened = np.empty(0, np.int32)  # descriptors
        self.seeker = np.empty(0, np.int64)  # the thread whose seek the position comes from
        self.actions = np.empty(0, np.uint8)  # by the number of the call's name

    def find_offsets(self, block: EventBlock, strings: StringTable, moved: np.ndarray) -> np.ndarray:
        """Per event (int64): where the read or write began; -1 where the event says it, or it is unknown.

        moved: the bytes by `count_moved_bytes`. To be called while files are still named by their hashes.
        """
        found = np.full(len(block), _UNKNOWN, np.int64)
        calls = block.is_event() & ((block.cat == ID["POSIX"]) | (block.cat == ID["STDIO"]))
        if not calls.any():
            return found
        known = len(self.position)
        more = len(strings) + 1 - known
        if more > 0:
            self.position = np.concatenate([self.position, np.full(more, _UNKNOWN, np.int64)])
            self.opened = np.concatenate([self.opened, np.zeros(more, np.int32)])
            self.seeker = np.concatenate([self.seeker, np.zeros(more, np.int64)])
            self.actions = np.concatenate([self.actions, np.full(more, 255, np.uint8)])
        used = np.zeros(len(self.actions), np.bool_)
        used[block.name[calls]] = True
        for number in np.flatnonzero(used & (self.actions == 255)).tolist():
            self.actions[number] = _find_action(strings.text(number))
        _follow_positions(
            calls, block.name, block.tid, block.cat == ID["STDIO"], block.arg_begin, block.arg_key,
            block.arg_kind, block.arg_val, _KEYS, _APPENDING, self.actions, moved, self.position, self.opened,
            self.seeker, found,
        )  # fmt: skip
        return found


def _find_action(name: str) -> int:
    if name in _LOSING:
        return LOSE
    return _OPERATIONS.get(find_operation(name), NOT_FOLLOWED)


_KEYS = np.array([ID[key] for key in ("ret", "offset", "whence", "flags", "fhash", "mode")], np.int32)
_APPENDING = np.array([ID[mode] for mode in ("a", "ab", "ae", "a+", "ab+", "a+b")], np.int64)  # of fopen(3)


@compiled
def _follow_positions(
    calls, name, tid, stdio, arg_begin, arg_key, arg_kind, arg_val,
    keys, appending, actions, moved, position, opened, seeker, found,
):  # fmt: skip
    """Fills `found`; changes `position`, `opened` and `seeker`.

    keys: the numbers of ret, offset, whence, flags, fhash, mode; appending: of the modes that append.
    moved: bytes, of each event.
    """
    for i in range(len(calls)):
        if not calls[i] or actions[name[i]] == NOT_FOLLOWED:
            continue
        action, ret, offset, whence, flags, file = actions[name[i]], -2, -1, -1, 0, -1
        has_offset = False
        for j in range(arg_begin[i], arg_begin[i + 1]):
            key, kind = arg_key[j], arg_kind[j]
            if kind == INT:
                value = arg_val[j]
                if key == keys[0]:
                    ret = value
                elif key == keys[1]:
                    offset, has_offset = value, True
                elif key == keys[2]:
                    whence = value
                elif key == keys[3]:
                    flags = value
            elif kind == STRING and key == keys[4]:
                file = arg_val[j]
            elif kind == STRING and key == keys[5] and (appending == arg_val[j]).any():
                flags |= _APPEND
        if file < 0:
            continue
        if opened[file] > 1 and seeker[file] != tid[i]:
            position[file] = _UNKNOWN
        if action == OPEN:
            if ret == -1:
                continue
            opened[file] += 1
            alone = opened[file] == 1 and not flags & _APPEND
            position[file] = 0 if alone else _UNKNOWN
        elif action == CLOSE:
            opened[file] = max(0, opened[file] - 1)
            if opened[file] == 0 or seeker[file]:
                position[file] = _UNKNOWN  # it is unknown which of several descriptors is left
            if opened[file] <= 1:
                seeker[file] = 0
        elif action == LOSE:
            position[file] = _UNKNOWN
        elif action == SEEK:
            place = ret if not stdio[i] else offset if whence == 0 and ret == 0 else _UNKNOWN
            if stdio[i] or place >= 0:  # a seek that failed moves nothing
                position[file] = place if 0 <= place <= MAX_WHOLE else _UNKNOWN
                seeker[file] = tid[i] if opened[file] > 1 else 0
        elif not has_offset and position[file] >= 0:
            found[i] = position[file]
            if moved[i] > MAX_WHOLE - position[file] or (ret == -2 and moved[i] == 0):
                position[file] = _UNKNOWN
            else:
                position[file] += moved[i]
