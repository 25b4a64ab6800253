// Node's server, whose app writes down each request that it sees (see app.py). Usage: node app.js PORT FILE
const fs = require("fs");
const http = require("http");
const [port, seen] = process.argv.slice(2);
const log = fs.openSync(seen, "a");
http
  .createServer((request, response) => {
    const path = request.url.split("?")[0];
    const marks = request.rawHeaders.filter((name, n) => n % 2 === 0 && name.toLowerCase() === "traceparent").length;
    const note = (body) => {
      fs.writeSync(log, `${request.method} ${path} ${marks} ${body.toString("hex") || "-"}\n`);
      response.setHeader("content-length", "2");
      response.end("ok");
    };
    if (path.startsWith("/ignore")) return note(Buffer.alloc(0));
    const chunks = [];
    request.on("data", (chunk) => chunks.push(chunk));
    request.on("end", () => note(Buffer.concat(chunks)));
  })
  .listen(Number(port), "0.0.0.0");
