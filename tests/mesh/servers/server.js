// Node's http server: it closes what is idle without a word on that connection, and answers before it reads.
const http = require('http');
const answer = (request, response) => {
  if (request.url === '/refuse') {
    response.writeHead(413, { 'content-length': 2 });
    return response.end('no');
  }
  let read = 0;
  request.on('data', (piece) => { read += piece.length; });
  request.on('end', () => response.end(`ok ${read}`));
};
const server = http.createServer({ keepAliveTimeout: 1000 }, answer);
server.on('checkContinue', (request, response) => {
  if (request.url !== '/refuse') response.writeContinue();
  answer(request, response);
});
server.listen(Number(process.argv[2]), '::');
