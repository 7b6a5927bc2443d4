"""The paper's figures (Tables 1 and 2), each a function from pictures to values a picture or to a `Statistic`."""
