"""What the Perfetto UI does when it opens one of our traces: it expands ranks and pins the run's counters;
and queries that answer questions, as commands (Ctrl-Shift-P). All use the UI's own commands, so the public UI
understands them, too.
"""

import json
from urllib.parse import quote

from analysis.perfetto.tracks import RUN_COUNTERS

MOST_EXPANDED = 8  # ranks, at most 10; of more, the first ones
_RANKS = rf"^rank [0-{MOST_EXPANDED - 1}]( on [^,]+)?(, launch \d+)? \d+$"  # the UI adds the pid
_COUNTERS = f"^({'|'.join(RUN_COUNTERS)}|lr|(read|write) MB/s by calls, all ranks)$"
_WHERE = "join thread_track k on s.track_id = k.id join thread using (utid) join process p using (upid)"
_SLICE = "s.id, s.ts, s.dur, s.track_id"  # by these the UI makes a row a link
_MOVED = (
    "case when s.name in ('fread', 'fwrite') then extract_arg(s.arg_set_id, 'debug.ret') * "
    "extract_arg(s.arg_set_id, 'debug.size') when s.name glob '*read*' or s.name glob '*write*' "
    "then max(0, extract_arg(s.arg_set_id, 'debug.ret')) end"
)
QUERIES = {
    "Slowest steps": (
        f"select s.name as step, p.name as process, s.dur / 1e6 as ms, {_SLICE} from slice s {_WHERE} "
        "where s.category = 'train' and s.name glob 'step*' order by s.dur desc limit 100"
    ),
    "I/O by file": (
        "select extract_arg(s.arg_set_id, 'debug.file') as file, s.name as call, count(*) as calls, "
        f"sum({_MOVED}) as bytes, sum(s.dur) / 1e6 as ms, max(s.dur) / 1e6 as longest_ms from slice s "
        "where s.category in ('POSIX', 'STDIO') group by 1, 2 order by ms desc limit 200"
    ),
    "Waiting for data": (
        "select extract_arg(s.arg_set_id, 'debug.step') as step, p.name as process, s.dur / 1e6 as ms, "
        f"{_SLICE} from slice s {_WHERE} "
        "where s.category = 'data' and s.name = 'wait' order by s.dur desc limit 100"
    ),
}
_RUN_QUERY = "dev.perfetto.RunQueryAndShowTab"
VIEW = [
    {"id": "dev.perfetto.ExpandTracksByRegex", "args": [_RANKS]},
    {"id": "dev.perfetto.PinTracksByRegex", "args": [_COUNTERS]},
]
FIRST_TAB = {"id": _RUN_QUERY, "args": [QUERIES["Slowest steps"]]}
MACROS = {name: [{"id": _RUN_QUERY, "args": [query]}] for name, query in QUERIES.items()}


def encode_commands(commands: list[dict]) -> str:
    """As a part of an address."""
    return quote(json.dumps(commands, separators=(",", ":")), safe="")


def make_public_address() -> str:
    """The public UI, which makes the same view of the file that is dropped on it."""
    return f"https://ui.perfetto.dev/#!/?startupCommands={encode_commands(VIEW)}"


def make_script() -> bytes:
    """For the UI's page, before it starts: the view in the address, the questions among its macros.

    A link to a slice shows that slice, not the table of slow steps. Macros of the user stay.
    """
    commands, tab, macros = (json.dumps(value).replace("<", "\\u003c") for value in (VIEW, FIRST_TAB, MACROS))
    return f"""<script>{{
  const hash = location.hash || "#!/";
  if (!hash.includes("startupCommands=")) {{
    const commands = {commands}.concat(/[?&]ts=/.test(hash) ? [] : [{tab}]);
    const sign = hash.includes("?") ? "&" : "?", text = encodeURIComponent(JSON.stringify(commands));
    const more = sign + "startupCommands=" + text;
    history.replaceState(null, "", location.pathname + location.search + hash + more);
  }}
  try {{
    const key = "perfettoSettings", id = "perfetto.CoreCommands#UserDefinedMacros";
    const settings = JSON.parse(localStorage.getItem(key) || "{{}}");
    settings[id] = {{...settings[id], ...{macros}}};
    localStorage.setItem(key, JSON.stringify(settings));
  }} catch {{}}
}}</script>""".encode()
