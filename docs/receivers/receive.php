<?php
// A whole receiver for PHP 8 with pdo_sqlite. Type: WEBHOOK_SECRET=… php -S 127.0.0.1:9000 receive.php
// It keeps what comes in events.db.
declare(strict_types=1);
ini_set('display_errors', '0'); // a warning in the answer would make it a 200

// Returns the status to answer with. The signature is over the bytes, so check it before you parse them.
function judge(string $body, string $signature, string $secret): int
{
    if ($secret === '' || !hash_equals('sha256=' . hash_hmac('sha256', $body, $secret), $signature)) {
        return 401;
    }
    try {
        keep(json_decode($body, true, 512, JSON_THROW_ON_ERROR), $body);
    } catch (Throwable $error) { // a full disk, for instance; the bridge sends the event again
        error_log((string) $error);
        return 500;
    }
    return 204;
}

// Stores an event once, and commits before the answer.
function keep(array $event, string $body): void
{
    $db = new PDO('sqlite:events.db');
    $db->exec('CREATE TABLE IF NOT EXISTS events (id TEXT PRIMARY KEY NOT NULL, body TEXT)');
    $add = $db->prepare('INSERT INTO events VALUES (?, ?) ON CONFLICT (id) DO NOTHING');
    $add->execute([$event['event_id'], $body]);
    if ($add->rowCount()) {
        error_log("{$event['event']} {$event['event_id']} " . json_encode($event['message'] ?? null));
    }
}

$signature = $_SERVER['HTTP_X_HUB_SIGNATURE_256'] ?? '';
http_response_code(judge((string) file_get_contents('php://input'), $signature, (string) getenv('WEBHOOK_SECRET')));
