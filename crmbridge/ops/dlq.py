"""``crmbridge dlq``: the dead deliveries, and another try for them."""

import time
from collections.abc import Sequence

from crmbridge.store import deliveries, turn
from crmbridge.store.database import Database
from crmbridge.store.deliveries import Patience


def show(db: Database) -> int:
    """Print the dead deliveries, oldest first; return 0."""
    for row in deliveries.dead(db):
        what = row["message_id"] if row["target"] == "instagram" else f"{row['event']} {row['event_id']}"
        print(f"{row['id']}  {row['finished_at']}  {row['account_id']}  {row['target']}  {what}  {row['last_code']}")
    return 0


def retry(db: Database, ids: Sequence[str], patience: Patience, *, everything: bool, force: bool) -> int:
    """Owe the named deliveries again, or all; print each; return 1 when one was left as it was."""
    wanted = [row["id"] for row in deliveries.dead(db)] if everything else list(ids)
    revived = set(turn.revive(db, wanted, time.time(), patience, force=force))
    for delivery_id in wanted:
        print(f"{'revived' if delivery_id in revived else 'left   '} {delivery_id}")
    left = len(wanted) - len(revived)
    if left:
        print(f"{left} left: not dead, of a deleted account, or a send in doubt (--force sends it again all the same)")
    return int(left > 0)
