// A CRM that knows the bridge by api-spec.yaml alone: it connects an account, reads events, answers, and follows.
// usage: node loop.js URL ADMIN_KEY INSTAGRAM_ACCOUNT_ID ACCESS_TOKEN
import createClient from "openapi-fetch";
import type { components, paths } from "./bridge.js";

type KnownEvent = components["schemas"]["KnownEvent"];
declare const process: { argv: string[] };

const PATIENCE_MS = 60_000;
const [url, key, instagram_account_id, access_token] = process.argv.slice(2) as [string, string, string, string];
const client = createClient<paths>({ baseUrl: url, headers: { Authorization: `Bearer ${key}` } });

function told<T>(answer: { data?: T; error?: unknown }): T {
  if (answer.data === undefined) throw new Error(JSON.stringify(answer.error));
  return answer.data;
}

const asked = { instagram_account_id, access_token };
const { account_id } = told(await client.POST("/api/v1/accounts", { body: asked }));

let after: string | undefined;
let message_id: string | undefined;
const others = new Set<string>();
const heard: (string | null)[] = [];
const warnings: string[] = [];
const statuses: string[] = [];
const deadline = Date.now() + PATIENCE_MS;
while (!(statuses.includes("message.delivered") && statuses.includes("delivered"))) {
  if (Date.now() > deadline) throw new Error(JSON.stringify({ heard, statuses }));
  const page = told(await client.GET("/api/v1/events", { params: { query: { account_id, after } } }));
  after = page.next_cursor ?? undefined;
  for (const any of page.events) {
    const event = any as KnownEvent; // what is none goes to `default`
    switch (event.event) {
      case "message.received": {
        heard.push(event.message);
        const body: components["schemas"]["SendRequest"] = {
          account_id: event.account_id,
          recipient_id: event.sender_id,
          message: `You wrote at ${event.timestamp.slice(11, 16)}.`,
          idempotency_key: `answer to ${event.event_id}`,
        };
        const sent = told(await client.POST("/api/v1/messages/send", { body }));
        if (!("message_id" in sent)) throw new Error("a dry run was not asked for");
        message_id = sent.message_id;
        warnings.push(...sent.warnings);
        statuses.push(sent.status);
        break;
      }
      case "message.sent":
      case "message.delivered":
      case "message.read":
      case "message.failed":
        statuses.push(event.event);
        break;
      default:
        others.add(any.event);
    }
  }
  if (message_id) {
    const path = { message_id };
    statuses.push(told(await client.GET("/api/v1/messages/{message_id}/status", { params: { path } })).status);
  }
  if (!page.has_more) await new Promise((resolve) => setTimeout(resolve, 100));
}
console.log(JSON.stringify({ heard, others: [...others].sort(), warnings, statuses }));
