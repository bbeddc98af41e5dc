-- Collation C: names of claims are found by their beginning through the index.
CREATE DATABASE mlflow OWNER mlflow TEMPLATE template0 ENCODING 'UTF8' LC_COLLATE 'C' LC_CTYPE 'C.UTF-8';
CREATE DATABASE users OWNER mlflow TEMPLATE template0 ENCODING 'UTF8' LC_COLLATE 'C' LC_CTYPE 'C.UTF-8';
