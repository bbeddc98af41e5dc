#!/bin/sh
# Print a random value of each secret of the team's server, as lines of a shell or of compose's .env.
set -eu
for name in PGPASSWORD ADMIN_PASSWORD MLFLOW_FLASK_SERVER_SECRET_KEY AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY; do
  printf '%s=%s\n' "$name" "$(openssl rand -hex 16)"
done
