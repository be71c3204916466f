-- The expected device seconds of a model's waiting and running jobs, for KEDA's PostgreSQL scaler. Replace the parameter
-- by the model's name in quotes; targetQueryValue is the device seconds per worker. Running jobs count, so that no worker
-- is removed before the last of them has ended. Paused jobs do not count. Prometheus has the same number:
-- farm_queued_device_seconds + farm_running_device_seconds.
WITH RECURSIVE models (model) AS (  -- a loose scan of the backlog's index, and so are the batches
  SELECT (SELECT min(model) FROM jobs WHERE state = 'pending')
  UNION ALL
  SELECT (SELECT min(model) FROM jobs WHERE state = 'pending' AND model > models.model)
  FROM models WHERE models.model IS NOT NULL
), waiting (batch_id) AS (
  SELECT (SELECT min(batch_id) FROM jobs WHERE state = 'pending' AND model = :model)
  UNION ALL
  SELECT (SELECT min(batch_id) FROM jobs WHERE state = 'pending' AND model = :model AND batch_id > waiting.batch_id)
  FROM waiting WHERE waiting.batch_id IS NOT NULL
), active AS (
  SELECT batches.id, CASE  -- job_counts counts by batch, not by model
    WHEN EXISTS (SELECT 1 FROM models WHERE model <> :model AND EXISTS (
      SELECT 1 FROM jobs WHERE state = 'pending' AND jobs.model = models.model AND batch_id = batches.id
    )) THEN (SELECT count(*) FROM jobs WHERE state = 'pending' AND model = :model AND batch_id = batches.id)
    ELSE (SELECT sum(n) FROM job_counts WHERE batch_id = batches.id AND state = 'pending')
  END AS jobs
  FROM waiting JOIN batches ON batches.id = waiting.batch_id LEFT JOIN owners ON owners.name = batches.owner
  WHERE accepted_at IS NOT NULL AND deleted_at IS NULL AND NOT batches.paused AND NOT coalesce(owners.paused, false)
  UNION ALL
  SELECT batch_id, count(*) FROM jobs JOIN batches ON batches.id = batch_id
  WHERE state = 'queued' AND model = :model AND accepted_at IS NOT NULL AND deleted_at IS NULL GROUP BY batch_id
  UNION ALL
  SELECT batch_id, count(*) FROM jobs JOIN batches ON batches.id = batch_id
  WHERE state = 'running' AND model = :model AND accepted_at IS NOT NULL AND deleted_at IS NULL GROUP BY batch_id
), usual AS (  -- the recent mean of the model, over all batches
  SELECT avg(seconds) AS seconds FROM (
    SELECT (
      SELECT avg(seconds) FROM (
        SELECT model, reused_from, coalesce(device_seconds, render_seconds) AS seconds FROM jobs
        WHERE batch_id = batches.id AND finished_at IS NOT NULL ORDER BY finished_at DESC LIMIT 40
      ) AS last WHERE model = :model AND reused_from IS NULL
    ) AS seconds
    FROM batches WHERE accepted_at IS NOT NULL AND deleted_at IS NULL ORDER BY created_at DESC LIMIT 50
  ) AS newest
)
SELECT coalesce(sum(active.jobs * coalesce(
  (
    SELECT avg(seconds) FROM (
      SELECT model, reused_from, coalesce(device_seconds, render_seconds) AS seconds FROM jobs
      WHERE batch_id = active.id AND finished_at IS NOT NULL ORDER BY finished_at DESC LIMIT 16
    ) AS last WHERE model = :model AND reused_from IS NULL
  ),
  usual.seconds, 1.0
)), 0) AS device_seconds
FROM active CROSS JOIN usual
