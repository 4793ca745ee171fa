// A whole receiver for Node 22.13 or later. Type: WEBHOOK_SECRET=… node receive.js 9000
// It keeps what comes in events.db.
const crypto = require("node:crypto");
const http = require("node:http");
const { DatabaseSync } = require("node:sqlite");

const secret = process.env.WEBHOOK_SECRET;
if (!secret) throw new Error("WEBHOOK_SECRET is missing");
const db = new DatabaseSync("events.db");
db.exec("CREATE TABLE IF NOT EXISTS events (id TEXT PRIMARY KEY NOT NULL, body TEXT)");

// Returns the status to answer with. The signature is over the bytes, so check it before you parse them.
function judge(body, signature) {
  const wanted = Buffer.from("sha256=" + crypto.createHmac("sha256", secret).update(body).digest("hex"));
  const given = Buffer.from(signature);
  if (wanted.length !== given.length || !crypto.timingSafeEqual(wanted, given)) return 401;
  try {
    keep(JSON.parse(body), body.toString());
  } catch (error) { // a full disk, for instance; the bridge sends the event again
    console.error(error);
    return 500;
  }
  return 204;
}

// Stores an event once, and commits before the answer.
function keep(event, body) {
  if (db.prepare("INSERT INTO events VALUES (?, ?) ON CONFLICT (id) DO NOTHING").run(event.event_id, body).changes)
    console.log(event.event, event.event_id, JSON.stringify(event.message));
}

http.createServer((request, response) => {
  const parts = [];
  let size = 0;
  request.on("data", (part) => {
    size += part.length;
    if (size <= 10_000_000) parts.push(part);
  });
  request.on("end", () => {
    const signature = request.headers["x-hub-signature-256"] ?? "";
    response.writeHead(size <= 10_000_000 ? judge(Buffer.concat(parts), signature) : 413).end();
  });
}).listen(Number(process.argv[2]), "127.0.0.1");
