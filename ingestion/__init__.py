"""Step 1 of the data flow: the publisher's CSV -> `raw_data.diabetes`.

`source` finds or fetches the file, `contract` says what a row is, `rows` streams and checks it,
`load` brings it into PostgreSQL, `synthetic` makes data where there is none.
"""
