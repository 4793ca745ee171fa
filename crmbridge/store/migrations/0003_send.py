"""What sends of every form need: which comment a private reply answers, and when a message becomes stale."""

from peewee import Database
from playhouse.migrate import SchemaMigrator

STATEMENTS = (
    "ALTER TABLE outbound_messages ADD COLUMN comment_id TEXT /* the comment that a private reply answers */",
    "ALTER TABLE outbound_messages ADD COLUMN send_before TEXT /* after this it is not sent any more */",
    """
    CREATE INDEX outbound_comment ON outbound_messages (account_id, comment_id)
        WHERE comment_id IS NOT NULL""",
)


def up(migrator: SchemaMigrator, db: Database) -> None:
    for statement in STATEMENTS:
        db.execute_sql(statement.strip())
