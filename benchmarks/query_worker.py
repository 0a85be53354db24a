"""Ask DuckDB for the strongest tokens of some latents; prints what it found and how long it took.

Runs in DuckDB's own environment, with nothing but it and the standard library. The codes are a long
table (token, latent, value): of a Parquet file, which is what a store is without an index, or of
DuckDB's own file. A connection that stays open may keep the Parquet file's metadata.
"""

import json
import sys
import time

import duckdb

QUERY = (
    "SELECT token, value FROM {table} WHERE latent = {latent} "
    "ORDER BY abs(value) DESC, token LIMIT {top}"
)


def main() -> None:
    """Answer one request, a JSON object as the only argument."""
    asked = json.loads(sys.argv[1])
    if "make" in asked:
        with duckdb.connect(asked["make"]) as connection:
            connection.execute(
                f"CREATE TABLE codes AS SELECT * FROM read_parquet('{asked['parquet']}')"
            )
        print(json.dumps({}))
        return
    own = asked["file"].endswith(".duckdb")
    table = "codes" if own else f"read_parquet('{asked['file']}')"
    latents = asked["latents"]
    queries = [QUERY.format(table=table, latent=n, top=asked["top"]) for n in latents]
    anew, held, answers = [], [], []

    def connect() -> duckdb.DuckDBPyConnection:
        return duckdb.connect(asked["file"], read_only=True) if own else duckdb.connect()

    for query in queries:
        began = time.perf_counter()
        with connect() as connection:
            answers.append(connection.execute(query).fetchall())
        anew.append(time.perf_counter() - began)
    with connect() as connection:
        connection.execute("SET parquet_metadata_cache = true")
        for query in [queries[0], *queries]:  # the first one reads the metadata
            began = time.perf_counter()
            connection.execute(query).fetchall()
            held.append(time.perf_counter() - began)
    print(json.dumps({"anew": anew, "held": held[1:], "answers": answers}))


if __name__ == "__main__":
    main()
