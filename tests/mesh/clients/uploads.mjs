// What Node's clients do with uploads: fetch with a stream, Expect with its event, kept connections, giving up.
import assert from 'node:assert';
import http from 'node:http';

const SIZE = 3_000_000;
const BODY = 'x'.repeat(SIZE);

const expecting = (url, agent) => new Promise((resolve, reject) => {
  const headers = { Expect: '100-continue', 'Content-Length': SIZE };
  const request = http.request(url, { method: 'POST', agent, headers });
  let asked = false;
  request.on('continue', () => { asked = true; request.end(BODY); });
  request.on('response', (response) => {
    let text = '';
    response.on('data', (piece) => { text += piece; });
    response.on('end', () => { if (!asked) request.destroy(); resolve([response.statusCode, text.trim(), asked]); });
  });
  request.on('error', reject);
  request.flushHeaders();
});

for (const address of process.argv.slice(2)) {
  const url = `http://${address}`;
  const agent = new http.Agent({ keepAlive: true, maxSockets: 1 });
  for (let n = 0; n < 3; n += 1) {
    assert.deepStrictEqual(await expecting(`${url}/`, agent), [200, `ok ${SIZE}`, true], url);
    const refused = await expecting(`${url}/refuse`, agent);
    assert.deepStrictEqual(refused.slice(0, 2), [413, 'no'], url);
  }
  const stream = () => new Blob([BODY]).stream();
  const streamed = await fetch(url, { method: 'POST', body: stream(), duplex: 'half' });
  assert.deepStrictEqual([streamed.status, await streamed.text()], [200, `ok ${SIZE}`], url);
  const gone = new AbortController();
  const given = fetch(url, { method: 'POST', body: new ReadableStream({ start() {} }), duplex: 'half', signal: gone.signal });
  setTimeout(() => gone.abort(), 20);
  await assert.rejects(given);
  const after = await fetch(url, { method: 'POST', body: 'abc' });
  assert.deepStrictEqual([after.status, await after.text()], [200, 'ok 3'], url);
}
console.log('all well');
