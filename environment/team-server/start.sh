#!/bin/sh
# Start the team's MLflow server: a login, PostgreSQL, artifacts in a folder or on S3.
#
# docs/team-server.md says what the variables are and sets them; compose.yaml does so too.
set -eu
: "${PGPASSWORD:?}" "${ADMIN_PASSWORD:?}" "${MLFLOW_FLASK_SERVER_SECRET_KEY:?}" "${ARTIFACTS:?}"
: "${DATABASE:=127.0.0.1:5432}" "${PORT:=5000}" "${WORKERS:=2}" "${CONFIG:=/tmp}"
# The password is in PGPASSWORD, which libpq reads: every user can read command lines.
export MLFLOW_BACKEND_STORE_URI="postgresql://mlflow@$DATABASE/mlflow"
users="postgresql://mlflow@$DATABASE/users"
export MLFLOW_AUTH_CONFIG_PATH="$CONFIG/auth.ini" MLFLOW_DISABLE_TELEMETRY=true
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
umask 077
# EDIT: all may record runs in all experiments; who made a claim may change it, others read it.
# The cache saves one slow hash of the password per request.
cat >"$MLFLOW_AUTH_CONFIG_PATH" <<END
[mlflow]
default_permission = EDIT
database_uri = $users
admin_username = admin
admin_password = $ADMIN_PASSWORD
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
auth_cache_ttl_seconds = 60
END
case $ARTIFACTS in
  s3://*)
    python - "$ARTIFACTS" <<'END'
import os, sys, boto3
name = sys.argv[1].removeprefix("s3://").partition("/")[0]
s3 = boto3.client("s3", endpoint_url=os.environ.get("MLFLOW_S3_ENDPOINT_URL"))
if name not in [one["Name"] for one in s3.list_buckets()["Buckets"]]:
    s3.create_bucket(Bucket=name)
END
    ;;
esac
# Before the workers start, who would all make the tables of the users at once.
python -m mlflow.server.auth db upgrade --url "$users"
# A worker that starts slowly, as the first ones do, is not ended after uvicorn's 5 s.
exec python -m mlflow server --app-name basic-auth --host 0.0.0.0 --port "$PORT" \
  --workers "$WORKERS" --uvicorn-opts "--timeout-worker-healthcheck 120" \
  --artifacts-destination "$ARTIFACTS" ${HOSTS:+--allowed-hosts "$HOSTS"}
