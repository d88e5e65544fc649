-- Enqueue jobs that differ in their id and input only, in one step: all of them are queued, or none.
--
-- KEYS  1 queue list, 2 rq:queues
-- ARGV  1 RQ's key prefix, 2 'RPUSH' or 'LPUSH', 3 seconds that a job may wait (0: for ever), 4 how many jobs may wait
--       before these ('': any number), 5 length of what follows: the hash fields and values that all jobs share; then an
--       id and a data field for each job
-- Returns how many jobs were there already. They are left as they are: so a repetition, after a reply that was lost, does
-- no harm. Where too many wait, it writes nothing and returns an error, QUEUEFULL and how many.
local call = redis.call
local prefix, push, ttl, shared = ARGV[1] .. ':job:', ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[5])
local most, fields, known = tonumber(ARGV[4]), {unpack(ARGV, 6, 5 + shared)}, 0
-- A repetition finds its first job there, and is no reason to refuse.
if most and call('LLEN', KEYS[1]) > most and call('EXISTS', prefix .. ARGV[6 + shared]) == 0 then
  return redis.error_reply('QUEUEFULL ' .. call('LLEN', KEYS[1]))
end
call('SADD', KEYS[2], KEYS[1])
for n = 6 + shared, #ARGV, 2 do
  local id = ARGV[n]
  local job = prefix .. id
  if call('EXISTS', job) == 1 then
    known = known + 1
  else
    call('HSET', job, 'data', ARGV[n + 1], unpack(fields))
    if ttl > 0 then
      call('EXPIRE', job, ttl)
    end
    call(push, KEYS[1], id)
  end
end
return known
