"""What the channel's whole language needs: when a customer last wrote, and the business that an item names."""

from peewee import Database
from playhouse.migrate import SchemaMigrator

STATEMENTS = (
    "ALTER TABLE contacts ADD COLUMN last_wrote_at TEXT /* opens the window in which we may answer */",
    "ALTER TABLE inbound_events ADD COLUMN party TEXT /* the business as the item names it, where the entry did not */",
    "CREATE INDEX inbound_unrouted_party ON inbound_events (party) WHERE state = 'unrouted' AND party IS NOT NULL",
)


def up(migrator: SchemaMigrator, db: Database) -> None:
    for statement in STATEMENTS:
        db.execute_sql(statement)
