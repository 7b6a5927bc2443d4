"""What an adapter does, measured: pictures made in several ways, figures over them, a table and a page.

`captions` and `evaluate_command` read what to evaluate, `ways` makes the pictures through `XAdapterPipeline`,
`made_with` tells folders apart, `figures` measures, `intervals` says how sure that is, `report` and `page` show it, and
`program` is the command.

A figure is a `Statistic` for each way: a function from how often each caption counts to a number, of which
`intervals.compare` makes intervals and paired differences. `MeanOverCaptions` makes one of values a picture,
`FrechetDistance` one of features; any network and any map of the caller's own will do.
"""
